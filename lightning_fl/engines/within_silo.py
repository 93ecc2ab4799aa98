"""Collectives among the processes of a silo that train one client together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_fl.communication import Group, LocalGroup
from lightning_fl.engines.tensors import load
from lightning_fl.tree import sum_dtype


class WithinSilo:
    """Collectives among the processes of a silo that train one client together; without effect for a single process.

    Args:
        group: The ranks of the federation, each of which may be a silo of several processes. None: a single process.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or LocalGroup()
        self.inner, self.shards, self.is_spread = self.group.inner, self.group.shards, self.group.is_spread

    @property
    def is_alone(self) -> bool:
        """Whether the silo is one process."""
        return self.inner.size == 1

    @staticmethod
    def free_gathered(module: nn.Module) -> None:
        """Frees the unsharded parameters that a pass without gradients, such as validation, has left in memory."""
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def refuse_skipping(self) -> None:
        """Refuses a batch without a loss, because the other processes would wait for its gradients.

        Raises:
            ValueError: If the silo has several processes.
        """
        if not self.is_alone:
            raise ValueError(
                "training_step returned None to skip a batch, but the other processes of the silo wait for its "
                "gradients. Return a loss of zero instead, such as `0 * loss`."
            )

    def average_gradients(self, params: Iterable[Tensor]) -> None:
        """Replaces each gradient by its mean over the silo; without effect where ``fully_shard`` has done so.

        A missing gradient counts as 0 unless it is missing on every process, in which case it stays None.

        Args:
            params: The trainable parameters, in the same order on each process.
        """
        if self.is_alone or self.is_spread:
            return
        params = list(params)
        has = torch.tensor([param.grad is not None for param in params], dtype=torch.uint8)
        has = self.inner.all_reduce(has, "max")
        found = [param for param, one in zip(params, has.tolist(), strict=True) if one]
        for dtype in dict.fromkeys(param.dtype for param in found):
            own = [param for param in found if param.dtype == dtype]
            flat = torch.cat([_dense(param).reshape(-1) for param in own])
            mean = self.inner.all_reduce(flat) / self.inner.size
            for param, part in zip(own, mean.split([param.numel() for param in own]), strict=True):
                param.grad = part.view(param.shape)

    def join_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Gives all processes the same buffers: the first one's, or where parameters are sharded, the mean of floats.

        Args:
            buffers: The shared and personal buffers, which are changed in place.
        """
        if self.is_alone:
            return
        joined = {}
        for name, buffer in buffers.items():
            if self.is_spread and buffer.is_floating_point():
                mean = self.inner.all_reduce(buffer.to(sum_dtype(buffer.dtype))) / self.inner.size
                joined[name] = mean.to(buffer.dtype)
            else:
                joined[name] = self.inner.broadcast(buffer)
        load(buffers, joined)

    def joint_squares(self, squares: list[float]) -> list[float]:
        """Squared norms of full tensors, from those of the parts that the processes hold."""
        if self.shards.size == 1:
            return squares
        return self.shards.all_reduce(torch.tensor(squares, dtype=torch.float64)).tolist()

    def joint_norm(self, own: float) -> float:
        """The norm of full tensors, from that of the parts that this process holds."""
        return own if self.shards.size == 1 else float(self.joint_squares([own**2])[0] ** 0.5)

    def all_agree(self, own: list[bool]) -> list[bool]:
        """For each flag, whether it is True on every process of the silo."""
        if self.is_alone:
            return own
        return [bool(one) for one in self.inner.all_reduce(torch.tensor(own, dtype=torch.uint8), "min").tolist()]

    def mean_of(self, measured: Any) -> Any:
        """The mean over the silo of a tensor, or of each tensor in a tree."""
        if self.is_alone:
            return measured
        if isinstance(measured, Mapping):
            return {name: self.inner.all_reduce(own) / self.inner.size for name, own in measured.items()}
        return self.inner.all_reduce(measured) / self.inner.size

    def mean(self, value: float) -> float:
        """The mean of a number over the silo's processes that have one."""
        if self.is_alone:
            return value
        known = not math.isnan(value)
        total, number = self.inner.all_reduce(torch.tensor([value if known else 0.0, known], dtype=torch.float64))
        return float(total / number) if number else math.nan


def _dense(param: Tensor) -> Tensor:
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    return grad.to_dense() if grad.is_sparse else grad
