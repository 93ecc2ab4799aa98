"""Recurrent layers of several clients give what those of each client give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_fl.engines import VectorizedEngine
from lightning_fl.engines.optimizer_states import OptimizerStates

CLIENTS, BATCH, TIME, FEATURES = 3, 4, 5, 6


class Net(nn.Module):
    def __init__(self, kind: Any, packs: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = kind(FEATURES, 7, **options)
        self.packs = packs

    def loss(self, x: Tensor) -> Tensor:
        if self.packs:
            x = pack_padded_sequence(x, torch.tensor([TIME, TIME, TIME, 2]))
        output, last = self.layer(x)
        last = last if isinstance(last, tuple) else (last,)
        return sum((own**2).mean() * (index + 1) for index, own in enumerate((output, *last)))  # type: ignore[return-value]


def loaded(net: Net) -> VectorizedEngine:
    """An engine with clients that start at different parameters."""
    engine = VectorizedEngine(net, OptimizerStates([torch.optim.SGD(net.parameters(), 0.1)]))
    start = engine.begin_round(None)
    engine.start(
        [{name: own * (1 + client) for name, own in start.items()} for client in range(CLIENTS)], [{}] * CLIENTS
    )
    return engine


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
        (nn.RNN, {"nonlinearity": "relu", "bias": False}),
        (nn.RNN, {}),
        (nn.LSTM, {"bias": False}),
        (nn.GRU, {"bias": False, "batch_first": True}),
    ],
)
def test_losses_and_gradients_are_those_of_each_client(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Net(kind, dtype=torch.float64, **options)
    copies = net.layer._flat_weights
    engine = loaded(net)
    x = torch.randn(CLIENTS, BATCH, TIME, FEATURES, dtype=torch.float64)
    losses, _ = engine.forward_stacked(lambda own: (net.loss(own), []), x)
    grads = engine.gradients(losses.sum())
    # No client's weights stay in the layer, which holds them a second time.
    assert net.layer._flat_weights is copies
    assert all(
        own is net.layer._parameters[name] for own, name in zip(copies, net.layer._flat_weights_names, strict=True)
    )
    for client in range(CLIENTS):
        alone = engine.step_alone(lambda own: (net.loss(own), []), client, x[client])
        torch.testing.assert_close(losses[client].detach(), alone.loss, rtol=1e-12, atol=0)
        assert grads.keys() == alone.grads.keys()
        for name, grad in alone.grads.items():
            torch.testing.assert_close(grads[name][client], grad, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [{"packs": True}, {"proj_size": 3}, {"num_layers": 2, "dropout": 0.5}])
def test_what_the_cells_do_not_cover_is_left_to_torch_which_refuses_it(options: dict[str, Any]) -> None:
    net = Net(nn.LSTM, **options)
    x = torch.randn(CLIENTS, TIME, BATCH, FEATURES)
    with pytest.raises(RuntimeError):
        loaded(net).forward_stacked(lambda own: (net.loss(own), []), x)
