"""Recurrent layers of several clients, cell by cell: libraries have kernels for the weights of one client only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fl.torch_internals import outside_vmap, unwrap, unwrap_or_spread, wrap

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""Maps the gates' input part, the state, the hidden weight (transposed) and its bias to the next state."""


def _lstm_cell(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    hidden, memory = state
    gates = torch.baddbmm(gates if bias is None else gates + bias, hidden, weight)
    admit, keep, new, show = gates.chunk(4, -1)
    memory = keep.sigmoid() * memory + admit.sigmoid() * new.tanh()
    return show.sigmoid() * memory.tanh(), memory


def _gru_cell(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    (hidden,) = state
    own = torch.bmm(hidden, weight) if bias is None else torch.baddbmm(bias, hidden, weight)
    (reset, update, new), (own_reset, own_update, own_new) = gates.chunk(3, -1), own.chunk(3, -1)
    new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
    return (torch.lerp(new, hidden, (update + own_update).sigmoid()),)


def _plain_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    def cell(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
        return (activation(torch.baddbmm(gates if bias is None else gates + bias, state[0], weight)),)

    return cell


def batched(cell: Cell) -> Callable[..., Any]:
    """The batching rule of ``torch.lstm`` and its like, which returns None for what it does not cover."""

    def rule(
        input: Tensor,
        hx: Tensor | State,
        params: Any,
        has_biases: bool = True,
        num_layers: int = 1,
        dropout: float = 0.0,
        train: bool = False,
        bidirectional: bool = False,
        batch_first: bool = False,
    ) -> Any:
        each = 4 if has_biases else 2
        num_runs = num_layers * (2 if bidirectional else 1)
        # Not covered: packed sequences, whose third argument is the state, LSTMs with projections, random numbers.
        is_plain = isinstance(params, list) and len(params) == each * num_runs and not (dropout and train)
        own = unwrap(input) if is_plain and not torch.is_autocast_enabled(input.device.type) else None
        if own is None:
            return None
        states = hx if isinstance(hx, tuple) else (hx,)
        unwrapped = unwrap_or_spread([*states, *params], len(own[0]))
        assert unwrapped is not None
        starts, weights = unwrapped[: len(states)], unwrapped[len(states) :]
        with outside_vmap():
            output = own[0].transpose(1, 2) if batch_first else own[0]  # [clients, time, batch, features]
            ends: list[State] = []
            while len(ends) < num_runs:
                outputs = []
                for is_reversed in (False, True)[: 1 + bidirectional]:
                    index = len(ends)
                    start = tuple(state[:, index] for state in starts)
                    found, end = _run(cell, output, start, weights[each * index : each * (index + 1)], is_reversed)
                    outputs.append(found)
                    ends.append(end)
                output = torch.cat(outputs, -1)
            last = [torch.stack(own_ends, 1) for own_ends in zip(*ends, strict=True)]
            return wrap(output.transpose(1, 2) if batch_first else output), *map(wrap, last)

    return rule


def _run(cell: Cell, input: Tensor, state: State, weights: Sequence[Tensor], is_reversed: bool) -> tuple[Tensor, State]:
    """One layer in one direction; ``input`` has the shape ``[clients, time, batch, features]``."""
    of_input, of_hidden, *biases = weights
    rows = input.flatten(1, 2)
    bias, own_bias = (None, None) if not biases else (own.unsqueeze(1) for own in biases)
    product = torch.bmm(rows, of_input.mT) if bias is None else torch.baddbmm(bias, rows, of_input.mT)
    steps = product.unflatten(1, input.shape[1:3]).unbind(1)
    weight, outputs = of_hidden.mT, []
    for gates in reversed(steps) if is_reversed else steps:
        state = cell(gates, state, weight, own_bias)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if is_reversed else outputs, 1), state


RULES: dict[Any, Callable[..., Any]] = {
    torch.lstm: batched(_lstm_cell),
    torch.gru: batched(_gru_cell),
    torch.rnn_tanh: batched(_plain_cell(torch.tanh)),
    torch.rnn_relu: batched(_plain_cell(torch.relu)),
}
"""The batching rule of each function."""
