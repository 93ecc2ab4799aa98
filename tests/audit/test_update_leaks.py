"""``fl.audit``: what gradients, updates and losses betray, against the data themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.audit import (
    gradients_of,
    gradients_of_update,
    invert_gradients,
    invert_linear,
    label_of,
    losses_of,
    membership_auc,
    psnr,
)
from tests.helpers.training import trainer

DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16), torch.tensor(DIGITS.target)


def network(hidden: int = 32, activation: Any = nn.Sigmoid, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, hidden), activation(), nn.Linear(hidden, 10)).double()


@pytest.mark.parametrize("index", range(5))
def test_a_single_example_is_read_off_its_gradient(index: int) -> None:
    net, x, y = network(), X[index : index + 1], Y[index : index + 1]
    gradients = gradients_of(net, x, y)
    assert label_of(gradients["2.bias"]) == int(y)
    torch.testing.assert_close(invert_linear(gradients["0.weight"], gradients["0.bias"]), x[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("match", ["euclidean", "cosine"])
def test_deep_leakage_finds_the_example(match: Any) -> None:
    net, x, y = network(), X[:1], Y[:1]
    before = [param.clone() for param in net.parameters()]
    assert psnr(invert_gradients(net, gradients_of(net, x, y), x.shape, y, match=match), x) > 100
    assert all(map(torch.equal, before, net.parameters()))
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize(("noise", "least", "most"), [(1e-3, 62, 72), (1e-2, 42, 52), (1e-1, 22, 32)])
def test_noise_blurs_what_is_found(noise: float, least: float, most: float) -> None:
    net, x, y = network(), X[:1], Y[:1]
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: grad
        + noise * grad.norm() / grad.numel() ** 0.5 * torch.randn(grad.shape, generator=generator, dtype=grad.dtype)
        for name, grad in gradients_of(net, x, y).items()
    }
    assert least < psnr(invert_gradients(net, noisy, x.shape, y), x) < most
    assert psnr(torch.full_like(x, 0.5), x) < 10


def test_total_variation_smooths() -> None:
    net = nn.Sequential(nn.Flatten(), network())
    x, y = X[:1].view(1, 1, 8, 8), Y[:1]
    gradients = gradients_of(net, x, y)
    plain, smooth = (
        invert_gradients(net, gradients, x.shape, y, match="cosine", total_variation=weight, iterations=50)
        for weight in (0.0, 0.1)
    )
    assert smooth.diff(dim=-1).abs().mean() < 0.9 * plain.diff(dim=-1).abs().mean()


class Leaks(fl.callbacks.FederatedCallback):
    """Keeps what the clients send."""

    def __init__(self) -> None:
        self.updates: dict[Any, Any] = {}

    def on_client_end(self, trainer: Any, pl_module: Any, client: Any, run: Any, update: Any) -> None:
        self.updates[client] = {name: tensor.clone() for name, tensor in update.delta.items()}


class Classifier(fl.models.MLPClassifier):
    def __init__(self) -> None:
        super().__init__(hidden=(32,), lr=0.25)
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    validation_step = None  # type: ignore[assignment]


def test_an_update_of_a_federation_gives_its_example_away() -> None:
    """Through the Trainer: the server reads each client's only example off what it has sent."""
    clients = fl.datamodules.ClientLoaders({i: DataLoader(TensorDataset(X[i : i + 1], Y[i : i + 1])) for i in range(3)})
    leaks, module = Leaks(), Classifier()
    trainer(fl.FederatedStrategy("fedavg", engine="sequential"), callbacks=[leaks]).fit(module, clients)
    names = [name for name, _ in module.named_parameters()]
    for client, delta in leaks.updates.items():
        gradients = gradients_of_update(delta, lr=0.25)
        assert label_of(gradients[names[-1]]) == int(Y[client])
        found = invert_linear(gradients[names[0]], gradients[names[1]])
        torch.testing.assert_close(found, X[client], rtol=0, atol=1e-11)


def trained(epochs: int) -> float:
    """The AUC after so many epochs on 100 digits, a fifth of which are labelled at random."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(X), generator=generator)
    x, y = X[order[:100]], Y[order[:100]].clone()
    wrong = torch.rand(100, generator=generator) < 0.2
    y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    net = network(activation=nn.ReLU)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(100, generator=generator).split(10):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return membership_auc(
        losses_of(net, [(x, y)]), losses_of(net, DataLoader(TensorDataset(X[order[100:]], Y[order[100:]]), 500))
    )


@pytest.mark.slow
def test_overfitting_shows_who_was_in_the_training_data() -> None:
    assert 0.57 < trained(5) < 0.65
    assert 0.70 < trained(400) < 0.78


def test_the_area_under_the_curve_is_the_share_of_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    members, others = (torch.randint(9, (size,), generator=generator).double() for size in (30, 50))
    pairs = (members[:, None] < others).double() + 0.5 * (members[:, None] == others)
    assert membership_auc(members, others) == pytest.approx(pairs.mean().item())
    assert membership_auc(members, members) == pytest.approx(0.5)
    assert membership_auc(torch.zeros(3), torch.ones(4)) == 1.0


def test_what_can_not_be_attacked_is_said() -> None:
    net = network()
    batch = gradients_of(net, X[:8], Y[:8])
    with pytest.raises(ValueError, match="expected one, as for a single example's"):
        label_of(batch["2.bias"])
    with pytest.raises(ValueError, match="does not reveal the input"):
        invert_linear(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="lr=0"):
        gradients_of_update(batch, 0.0)
    with pytest.raises(ValueError, match="expected 'euclidean' or 'cosine'"):
        invert_gradients(net, batch, (8, 64), Y[:8], match="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a parameter of the module"):
        invert_gradients(net, {**batch, "head": X}, (8, 64), Y[:8])
    with pytest.raises(ValueError, match="expected some of both"):
        membership_auc(torch.zeros(0), torch.ones(1))
