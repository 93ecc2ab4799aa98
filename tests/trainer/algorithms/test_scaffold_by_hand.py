"""SCAFFOLD on a network whose clients have two labels each, beside the paper's Algorithm 1 written in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lightning_fl as fl
from tests.helpers.training import Plain, trainer, weights

NUM_CLIENTS, BATCH_SIZE, ROUNDS, LR = 4, 4, 6, 0.3


def two_labels_each() -> list[TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    clients = []
    for client in range(NUM_CLIENTS):
        size = 9 + 4 * client
        y = torch.tensor([client, (client + 1) % NUM_CLIENTS]).repeat(size)[:size]
        x = torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64) + y[:, None, None, None]
        clients.append(TensorDataset(x, y))
    return clients


class Rectified(Plain):
    def __init__(self, momentum: float = 0.0) -> None:
        lr = LR * (1 - momentum)
        super().__init__(make_optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum))
        self.net[2] = nn.ReLU()


def by_hand(option: int, momentum: float = 0.0) -> Tensor:
    """Algorithm 1 of Karimireddy et al. (2020) with all clients in each round and a server step of 1.

    With momentum the distance is divided by that under a constant gradient of 1.
    """
    net, clients, lr = Rectified().net, two_labels_each(), LR * (1 - momentum)
    shapes = {name: param.shape for name, param in net.named_parameters()}

    def gradient(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = at.split([shape.numel() for shape in shapes.values()])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        found = grad(lambda own: cross_entropy(functional_call(net, own, (x,)), y))(params)
        return torch.cat([part.reshape(-1) for part in found.values()])

    x_server = torch.cat([param.detach().reshape(-1) for param in net.parameters()])
    c_server, c_clients = torch.zeros_like(x_server), torch.zeros(NUM_CLIENTS, len(x_server)).double()
    for _ in range(ROUNDS):
        models, controls = [], []
        for client, data in enumerate(clients):
            model, distance = x_server.clone(), 0.0
            velocity, unit_velocity = torch.zeros_like(model), 0.0
            for first in range(0, len(data), BATCH_SIZE):
                x, y = data[first : first + BATCH_SIZE]
                velocity = momentum * velocity + gradient(model, x, y) - c_clients[client] + c_server
                unit_velocity = momentum * unit_velocity + 1
                model -= lr * velocity
                distance += lr * unit_velocity
            models.append(model)
            if option == 1:
                controls.append(gradient(x_server, *data[:]))
            else:
                controls.append(c_clients[client] - c_server + (x_server - model) / distance)
        x_server = torch.stack(models).mean(0)
        c_server += (torch.stack(controls) - c_clients).mean(0)
        c_clients = torch.stack(controls)
    return x_server


def in_a_trainer(algorithm: fl.algorithms.Algorithm, momentum: float = 0.0) -> Tensor:
    module = Rectified(momentum)
    data = fl.datamodules.ClientDatasets(two_labels_each(), batch_size=BATCH_SIZE, shuffle=False)
    trainer(fl.FederatedStrategy(algorithm), ROUNDS).fit(module, data)
    return weights(module)


@pytest.mark.parametrize("option", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_it_is_the_algorithm_of_the_paper(option: int) -> None:
    expected = by_hand(option)
    torch.testing.assert_close(in_a_trainer(fl.algorithms.Scaffold(option=option)), expected, rtol=1e-9, atol=1e-11)
    # The corrections matter here, so that the comparison would notice wrong ones.
    uncorrected = in_a_trainer(fl.algorithms.FedAvg()) if option == 2 else by_hand(2)
    assert (uncorrected - expected).abs().max() > 0.01


def test_with_momentum_the_control_is_still_a_mean_of_gradients() -> None:
    found = in_a_trainer(fl.algorithms.Scaffold(), momentum=0.5)
    torch.testing.assert_close(found, by_hand(2, momentum=0.5), rtol=1e-9, atol=1e-11)
    assert (found - by_hand(2)).abs().max() > 0.001
