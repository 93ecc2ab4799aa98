"""A silo of several processes in a federation over a network: the first one talks, and tells the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fl.aggregation import Aggregator, RoundContext
from lightning_fl.clients import ClientStore
from lightning_fl.communication import Group, Message
from lightning_fl.communication.objects import decode_object, encode_object
from lightning_fl.coordinator.silo import Introduction, NetworkFederation, WholeTensors
from lightning_fl.engines.kept_optimizers import params_of_kept
from lightning_fl.engines.spread import gather_state, local, part_of, scatter_state, whole
from lightning_fl.engines.tensors import FederatedTensors, load
from lightning_fl.federation import (
    Closing,
    Federation,
    FederationSettings,
    FederationState,
    Opening,
    RankReport,
    ServerRound,
)
from lightning_fl.types import Aggregate, State, Tree, Update


class SharedSilo(Federation):
    """A silo whose processes train together: the first one talks to the coordinator, and tells the others.

    Where the parameters are spread over the processes, what goes out is put together, and each keeps its part of what
    comes in.

    Args:
        group: The processes of the silo; a federation of one rank.
        module: The module, whose parameters may be spread.
        talker: The way to the coordinator; None on all processes but the first.
    """

    knows_all_clients = False

    def __init__(self, group: Group, module: nn.Module, talker: NetworkFederation | None) -> None:
        super().__init__(group, 0, 1)
        self.talker = talker
        self.store: ClientStore | None = None
        self._optimizers: Sequence[Optimizer] = ()
        self._module = module
        if talker is not None:
            talker.group = group
        self.name: str = self._tell(lambda own: own.name)

    def _tell(self, ask: Callable[[NetworkFederation], Any]) -> Any:
        """What the first process has found out, on all of them."""
        found = None if self.talker is None else ask(self.talker)
        return decode_object(self.group.inner.broadcast_message(encode_object(found)))

    @property
    def _held(self) -> Mapping[str, Tensor]:
        return dict(self._module.named_parameters())

    # ---- joining

    def join(self, tensors: FederatedTensors, introduction: Introduction) -> None:
        """As :meth:`~lightning_fl.coordinator.silo.NetworkFederation.join`, for all processes of the silo."""
        roles: tuple[Mapping[str, Tensor], ...] = (tensors.params, tensors.buffers, tensors.frozen, tensors.personal)
        held = self._held
        full = [{name: self._whole(name, own, held) for name, own in tree.items()} for tree in roles]
        if self.talker is not None:
            self.talker.join(WholeTensors(*full), introduction)
        for own, start in zip(roles, full, strict=True):
            received = {name: self.group.inner.broadcast(tensor) for name, tensor in start.items()}
            load(own, {name: part_of(tensor, held.get(name, tensor)) for name, tensor in received.items()})
        self.place, self.size = self._tell(lambda own: [own.place, own.size])

    @staticmethod
    def _whole(name: str, tensor: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        return whole(local(tensor), held[name]).detach() if name in held else tensor

    def restore(self, store: ClientStore, optimizers: Sequence[Optimizer] = ()) -> None:
        """Gives the client's state, or the part that a process holds, to the stores of all processes."""
        self.store, self._optimizers = store, optimizers
        if self.talker is not None:
            self.talker.restore(store)
        self._share_state()

    def _share_state(self) -> None:
        """Gives all processes what the first one has found in its folder, if it has looked."""
        store = self.store
        if store is None or not self._tell(lambda own: own.went_back):
            return
        state = self._tell(lambda own: store.get(self.name))
        if state:
            store.put(self.name, scatter_state(state, self._params_of(state)))
        if self.talker is not None:
            self.talker.went_back = False

    def _params_of(self, client_state: State) -> Mapping[str, Tensor]:
        """The parameters by the names that tensors of a client's state have."""
        return {**self._held, **params_of_kept(client_state.get("optimizer", {}), self._optimizers)}

    def leave(self, reason: str, error: BaseException | None = None) -> None:
        """Tells the coordinator, if it can be reached, that this silo does not go on."""
        if self.talker is not None:
            self.talker.leave(reason, error)

    # ---- rounds

    def open_round(self, done: int) -> Opening | None:
        found = self._tell(lambda own: _opening_as_plain(own.open_round(done)))
        self._share_state()
        return self._own_part(found)

    def ending(self, done: int) -> Opening | None:
        return self._own_part(self._tell(lambda own: _opening_as_plain(own.ending(done))))

    def _own_part(self, found: Any) -> Opening | None:
        if found is None:
            return None
        state = found.pop("state")
        return Opening(**found, state=FederationState(**scatter_state(state, self._held)))

    def start(
        self, settings: FederationSettings, state: FederationState, params: Tree, ctx: RoundContext
    ) -> FederationState:
        if self.talker is not None:
            return self.talker.start(settings, state, params, ctx)
        missing = len(settings.transforms) - len(state.transforms)
        return replace(state, transforms=[*state.transforms, *({} for _ in range(missing))])

    def merge(self, opened: ServerRound, acc: Any, report: RankReport) -> tuple[Any, list[RankReport]]:
        held = self._held
        if isinstance(acc, Update):
            acc = replace(acc, delta=gather_state(acc.delta, held), aux=gather_state(acc.aux, held))
        outcome: Any = None
        packed: Any = None
        assert self.store is not None
        state = self.store.staged(self.name) or {}
        state = gather_state(state, self._params_of(state))
        if self.talker is not None:
            outcome, reports = self.talker.merge(opened, acc, report, state)
            messages = [own.to_message() for own in reports]
            packed = [[encoded.fields, encoded.tensors] for encoded in messages], self.talker.update_counts
        packed, counts = decode_object(self.group.inner.broadcast_message(encode_object(packed)))
        if not counts and self.talker is None:
            self.store.roll_back()
        return outcome, [RankReport.from_message(Message(fields, tensors)) for fields, tensors in packed]

    def close_round(self, opened: ServerRound, acc: Any, joined: RankReport) -> Closing:
        found = self._tell(lambda own: _closing_as_plain(own.close_round(opened, acc, joined)))
        state, aggregate = found.pop("state"), found.pop("aggregate")
        state = replace(FederationState(**scatter_state(state, self._held)), transforms=opened.state.transforms)
        return Closing(**found, state=state, aggregate=Aggregate(**aggregate))

    def gather(self, message: Message, topic: str) -> list[Message]:
        return self._messages(lambda own: own.gather(message, topic))

    def gather_sums(self, aggregator: Aggregator, session: Any, message: Message, topic: str) -> list[Message]:
        return self._messages(lambda own: own.gather_sums(aggregator, session, message, topic))

    def _messages(self, ask: Callable[[NetworkFederation], list[Message]]) -> list[Message]:
        found = self._tell(lambda own: [[each.fields, each.tensors] for each in ask(own)])
        return [Message(fields, tensors) for fields, tensors in found]


def _opening_as_plain(opening: Opening | None) -> Any:
    if opening is None:
        return None
    assert opening.state is not None
    cohort = None if opening.cohort is None else list(opening.cohort)
    plain = {"round": opening.round, "cohort": cohort, "buffers": dict(opening.buffers), "facts": dict(opening.facts)}
    return {**plain, "state": _state_as_plain(opening.state)}


def _closing_as_plain(closing: Closing) -> dict[str, Any]:
    return {
        "state": _state_as_plain(replace(closing.state, transforms=())),
        "buffers": dict(closing.buffers),
        "aggregate": {name: getattr(closing.aggregate, name) for name in _OF_AGGREGATE},
        "norm": closing.norm,
        "facts": dict(closing.facts),
        "stop_reason": closing.stop_reason,
    }


_OF_AGGREGATE = ("delta", "buffers", "weight", "aux", "num_clients", "population")


def _state_as_plain(state: FederationState) -> dict[str, Any]:
    """A state without clocks and versions, which a coordinator's silos don't have."""
    moving = None if state.moving is None else list(state.moving)
    return {
        "server": dict(state.server),
        "transforms": [dict(own) for own in state.transforms],
        "moving": moving,
        "memory": dict(state.memory),
    }
