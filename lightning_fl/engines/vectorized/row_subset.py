"""Stacked clients of which only some train: their rows are gathered, stepped by themselves, and written back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.engines.optimizer_states import OptimizerStates, takes_counts
from lightning_fl.engines.vectorized.buffer_pool import BufferPool
from lightning_fl.torch_internals import take_counts_as_tensors
from lightning_fl.types import Tree

_STACKED = object()
"""In ``_other_states``, marks an optimizer state that is a row of a stacked tensor."""


class RowSubset:
    """The tensors of all clients of a group, and their optimizer states, while some of them train.

    Args:
        params: The clients' parameters, stacked, which the optimizers step.
        buffers: Their buffers, stacked.
        optimizers: The optimizers.
        pool: Provides the memory of the gathered rows.
    """

    def __init__(self, params: Tree, buffers: Tree, optimizers: OptimizerStates, pool: BufferPool) -> None:
        self.rows: Sequence[int] | None = None
        self._params = params
        self._buffers = buffers
        self._optimizers = optimizers
        self._pool = pool
        self._num_clients = len(next(iter(params.values())))
        self._stacked_states: dict[tuple[str, str], Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        """By parameter, how many steps each client has taken, if the optimizer can take a number for each."""
        self._other_states: dict[int, dict[tuple[str, str], Any]] = {}

    def choose(self, rows: Sequence[int] | None, params: Tree, buffers: Tree) -> tuple[Tree, Tree]:
        """Lets the optimizers step the clients at ``rows``.

        Args:
            rows: The clients' positions, in order. None: all clients.
            params: The current stacked parameters, to be written back.
            buffers: The current stacked buffers, to be written back.

        Returns:
            Parameters and buffers of the chosen clients; if all are chosen, the group's own tensors.
        """
        chosen = None if rows is None or len(rows) == self._num_clients else rows
        if chosen == self.rows:
            return params, buffers
        # Before the optimizers get other tensors, which empties their states.
        self._write_back(params, buffers)
        self.rows = chosen
        if chosen is None:
            taken, taken_buffers = self._params, self._buffers
        else:
            index = self._index(params)
            taken = {name: self._take(tensor, index).requires_grad_() for name, tensor in self._params.items()}
            taken_buffers = {name: self._take(tensor, index) for name, tensor in self._buffers.items()}
        for param in params.values():
            param.grad = None
        self._optimizers.replace_params({id(param): taken[name] for name, param in params.items()})
        self._load_states(taken)
        return taken, taken_buffers

    def _write_back(self, params: Tree, buffers: Tree) -> None:
        index = None if self.rows is None else self._index(params)
        if index is None:
            self._buffers = buffers
        else:
            for whole, own in ((self._params, params), (self._buffers, buffers)):
                for name, tensor in own.items():
                    whole[name].detach().index_copy_(0, index, tensor.detach())
        others: dict[tuple[str, str], Any] = {}
        for name, optimizer, param in self._stepped(params):
            for key, value in optimizer.state.get(param, {}).items():
                is_stacked = isinstance(value, Tensor) and value.shape == param.shape and key != "step"
                others[name, key] = _STACKED if is_stacked else value
                if key == "step" and takes_counts(optimizer):
                    counts = self._counts.setdefault(name, value.new_zeros(self._num_clients))
                    counts[slice(None) if self.rows is None else list(self.rows)] = value.flatten().to(counts)
                if is_stacked:
                    self._write_state((name, key), value, index)
        # By row, since clients at different steps may have different counters.
        for row in self.rows or range(self._num_clients):
            self._other_states[row] = others

    def _write_state(self, key: tuple[str, str], value: Tensor, index: Tensor | None) -> None:
        if index is None:
            self._stacked_states[key] = value
            return
        if key not in self._stacked_states:
            # No step uses the zeros: a row that has not been stepped yet takes its first steps with others at the same
            # step only.
            self._stacked_states[key] = value.new_zeros(self._num_clients, *value.shape[1:])
        self._stacked_states[key].index_copy_(0, index, value)

    def _load_states(self, params: Tree) -> None:
        index = None if self.rows is None else self._index(params)
        found: dict[str, dict[str, Any]] = {}
        for (name, key), value in self._other_states[self.rows[0] if self.rows else 0].items():
            if value is not _STACKED:
                # Rows share the object, and an optimizer counts in place.
                own = copy.deepcopy(value)
            elif index is None:
                own = self._stacked_states[name, key]
            else:
                own = self._take(self._stacked_states[name, key], index)
            found.setdefault(name, {})[key] = own
        differ = False
        for name, optimizer, param in self._stepped(params):
            if name in found:
                optimizer.state[param] = found[name]
                if name in self._counts:
                    found[name]["step"] = count = self._count(name, param)
                    differ |= count.dim() > 0
        self._take_counts_as_tensors(differ)

    def _count(self, name: str, param: Tensor) -> Tensor:
        """The number of steps of the clients that train: one number, or one for each if they differ."""
        counts = self._counts[name] if self.rows is None else self._counts[name][list(self.rows)]
        if bool((counts == counts[0]).all()):
            return counts[0].clone()
        # In float64, as the optimizer computes with a Python number: float32 has not enough digits of beta**step.
        return counts.double().view(-1, *[1] * (param.dim() - 1)).to(param.device)

    def _take_counts_as_tensors(self, are_tensors: bool) -> None:
        for optimizer in self._optimizers.optimizers:
            if takes_counts(optimizer):
                take_counts_as_tensors(optimizer, are_tensors)

    def close(self) -> None:
        """Puts the optimizers' options back."""
        self._take_counts_as_tensors(False)

    def _stepped(self, params: Tree) -> Iterator[tuple[str, Optimizer, Tensor]]:
        names = {id(param): name for name, param in params.items()}
        for optimizer in self._optimizers.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if id(param) in names:
                        yield names[id(param)], optimizer, param

    def _take(self, tensor: Tensor, index: Tensor) -> Tensor:
        out = self._pool.empty((len(index), *tensor.shape[1:]), tensor)
        return torch.index_select(tensor.detach(), 0, index, out=out)

    def _index(self, params: Tree) -> Tensor:
        return torch.tensor(self.rows, device=next(iter(params.values())).device)
