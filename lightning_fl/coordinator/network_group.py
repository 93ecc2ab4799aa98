"""Silos that meet at a coordinator, as a group: collectives between ranks run between them."""

from __future__ import annotations

import json
import logging
import secrets
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lightning_fl.communication import Group, Message
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.client import CallRefused, Client
from lightning_fl.coordinator.disk import Disk
from lightning_fl.coordinator.identity import Kit
from lightning_fl.coordinator.meetings import SUM, digest, split_messages
from lightning_fl.coordinator.policy import PolicyBroken, read_policy
from lightning_fl.coordinator.service import PROTOCOL

MAX_BYTES = 1 << 24
"""16 MiB: maximum size of a message to the others, or of a tensor to sum."""
SAY_S = 30.0
log = logging.getLogger("lightning_fl.network")


class MeetingOver(RuntimeError):
    """The meeting of the silos has ended early."""


class NetworkGroup(Group):
    """All silos of a federation, connected by the coordinator.

    The coordinator relays messages, so it can read them, and computes sums, so that a silo learns only the sum; under
    ``SecureAggregation`` it adds masked numbers. Used as a context manager, the group tells the others why it leaves.

    Args:
        address: The coordinator's address, ``https://host`` or ``https://host:port``.
        kit: The folder with the silo's key and certificate.

    Raises:
        ValueError: If the address or the kit is invalid.
        PolicyBroken: If this silo's policy does not name all others.
        NotAdmitted: If one side does not accept the other's certificate.
    """

    def __init__(self, address: str, kit: str | Path) -> None:
        own = Kit(kit)
        self.client, self._token, self._step = Client(address, own), secrets.token_hex(16), 0
        self.policy = read_policy(own.folder / "policy.yaml")
        folder = Disk().make_folder(own.folder / "state")
        # A separate file: this silo's training may write to the other one at the same time.
        self.audit = AuditLog(folder / "questions.jsonl")
        try:
            self._meeting, silos = self._come()
        except PolicyBroken as error:
            self.leave(str(error))
            raise
        super().__init__(silos.index(own.name), len(silos))
        self.names = silos
        self.audit.append("met", address=address, silos=silos)

    def _come(self) -> tuple[str, list[str]]:
        said = time.monotonic()
        while True:
            try:
                found = self.client.ask("POST", "/v1/meeting", {"token": self._token, "protocol": PROTOCOL})
            except CallRefused as refused:
                raise MeetingOver(str(refused)) from refused
            if found["meeting"] is not None:
                self.policy.check_silos(found["silos"])
                self.policy.check_cohort(found["silos"])
                return str(found["meeting"]), list(found["silos"])
            if time.monotonic() - said > SAY_S:
                log.warning("Waiting for %s.", ", ".join(found["waits_for"]))
                said = time.monotonic()

    def leave(self, reason: str) -> None:
        """Tells the others why this silo leaves; an empty reason means that it has finished."""
        client = Client(self.client.address, self.client.kit, gives_up_after=0)
        with suppress(OSError, RuntimeError, ValueError, json.JSONDecodeError):
            client.ask("POST", "/v1/meeting/leave", {"token": self._token, "reason": reason})
        client.close()
        self.client.close()

    def __enter__(self) -> NetworkGroup:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.leave("" if error is None else str(error) or type(error).__name__)

    # ---- collectives

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        data = Message({"topic": topic, "fields": message.fields}, message.tensors).encode()
        answer = self._exchange("gather", topic, data)
        found = [Message.decode(own) for own in split_messages(answer, self.size)]
        for rank, other in enumerate(found):
            if other.fields.get("topic") != topic or not isinstance(other.fields.get("fields"), dict):
                raise RuntimeError(f"The silos are out of sync: {self.who(rank)} is not at {topic!r}.")
        if split_messages(answer, self.size)[self.rank] != data:
            raise RuntimeError("The coordinator has changed this silo's message.")
        return [Message(other.fields["fields"], other.tensors) for other in found]

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        own = tensor.detach().cpu().contiguous()
        if op in ("min", "max"):
            parts = self.gather_tensor(own)
            return (parts.amin(0) if op == "min" else parts.amax(0)).to(tensor.device)
        total = Message.decode(self._exchange("sum", "sum", Message({}, {SUM: own}).encode())).tensors.get(SUM)
        if total is None or total.shape != own.shape or total.dtype != own.dtype:
            raise RuntimeError("The coordinator sent another sum than the one that was asked for.")
        return (total / self.size if op == "mean" else total).to(tensor.device)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        own = tensor if self.rank == root else torch.empty(0)
        found = self.all_gather(Message(tensors={"x": own}), "broadcast")[root].tensors["x"]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise RuntimeError(f"{self.who(root).capitalize()} sent a tensor of another shape or dtype.")
        return found.to(tensor.device)

    def barrier(self) -> None:
        self.all_gather(Message(), "barrier")

    def _exchange(self, kind: str, topic: str, data: bytes) -> bytes:
        if len(data) > MAX_BYTES:
            raise ValueError(f"A message of {len(data)} bytes is too large; at most {MAX_BYTES} are taken. Ask less.")
        place = f"/v1/meeting/{self._meeting}/{self._step}"
        self.audit.append("sending", topic=topic, kind=kind, bytes=len(data), digest=digest(data))
        start = time.perf_counter()
        try:
            self.client.call("PUT", f"{place}?kind={kind}", lambda: data)
            while True:
                status, _, answer = self.client.call("GET", place)
                if status == 200:
                    break
        except CallRefused as refused:
            raise MeetingOver(str(refused)) from refused
        self._step += 1
        self.traffic.num_bytes += len(data)
        self.traffic.seconds_waiting += time.perf_counter() - start
        found: bytes = answer
        return found
