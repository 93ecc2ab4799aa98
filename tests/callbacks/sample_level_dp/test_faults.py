"""What is broken in sample-level privacy stops the run."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.clients.local_work import LocalWork
from lightning_fl.privacy import PrivacyError
from lightning_fl.privacy.noise import add_noise
from lightning_fl.privacy.sample_level import dp_sgd as sgd
from lightning_fl.privacy.sample_level import per_sample
from lightning_fl.privacy.sample_level.poisson_loader import PoissonBatches, PoissonLoader
from tests.helpers.privacy import fit, private
from tests.helpers.training import Plain, image_clients


def breaks(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, broken: Any) -> str:
    monkeypatch.setattr(target, name, broken)
    with pytest.raises(PrivacyError) as error:
        fit(private(), 6, data=image_clients((200, 200), 20))
    return str(error.value)


def fixed_batches(self: PoissonBatches) -> Any:
    size = round(self.rate * self.num_examples)
    order = np.random.default_rng(0).permutation(self.num_examples)
    return iter([order[start : start + size].tolist() for start in range(0, self.num_examples, size)])


def test_batches_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Poisson" in breaks(monkeypatch, PoissonBatches, "__iter__", fixed_batches)


def test_batches_in_turn_that_pass_the_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fl.callbacks.sample_level_dp.callback.check_sampler", lambda: None)
    assert "each example is drawn varies" in breaks(monkeypatch, PoissonBatches, "__iter__", fixed_batches)


def test_a_loader_that_was_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "draws no Poisson batches" in breaks(
        monkeypatch, SampleLevelDP, "wrap_loaders", lambda self, loaders: loaders
    )


def test_batches_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = DataLoader.__iter__
    assert "not drawn by Poisson" in breaks(monkeypatch, PoissonLoader, "__iter__", lambda self: iterate(self))


def test_gradients_that_are_not_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none per sample" in breaks(
        monkeypatch, GradSampleHooks, "capture_backprops_hook", lambda self, *args, **kwargs: None
    )


def test_gradients_that_are_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(samples: Any, clip: float) -> Any:
        return {name: sample.sum(0) for name, sample in samples.items()}

    monkeypatch.setattr(sgd, "clipped_sum", unclipped)
    assert "clipped" in breaks(monkeypatch, per_sample, "clipped_sum", unclipped)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_noise_of_another_deviation(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    normal = fl.privacy.SecureNoise.normal

    def weaker(self: Any, size: int, std: float = 1.0) -> Tensor:
        return normal(self, size, std * (share if std != 1.0 or size > 100 else 1.0))

    assert "is recorded" in breaks(monkeypatch, fl.privacy.SecureNoise, "normal", weaker)


def test_noise_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(self: Any, size: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    assert "repeats" in breaks(monkeypatch, fl.privacy.SecureNoise, "normal", same)


def test_noise_that_repeats_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(flat: Any, std: float, source: Any) -> Any:
        return add_noise(flat, std, fl.privacy.SecureNoise(0))

    assert "repeats" in breaks(monkeypatch, sgd, "add_noise", same)


def test_more_steps_than_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "more steps than its ledger" in breaks(monkeypatch, LocalWork, "num_steps", lambda self, num_batches: 3)


def test_a_gradient_that_was_not_made_private(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gradient that is not private" in breaks(
        monkeypatch, SampleLevelDP, "on_after_backward", lambda self, trainer, module: None
    )


def test_a_step_that_is_skipped() -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    with pytest.raises(PrivacyError, match="returned NoneType instead of a loss"):
        fit(private(), module=Skips())


def test_a_buffer_that_changes() -> None:
    class Counts(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.total += batch[0].sum()
            return super().training_step(batch, batch_idx)

    with pytest.raises(PrivacyError, match="changed the buffer total"):
        fit(private(), module=Counts())


def test_a_second_fit_from_the_start_is_warned_of() -> None:
    callback = private(method="rdp")
    fit(callback)
    with pytest.warns(UserWarning, match="start with new ledgers"):
        fit(callback)


def test_the_module_is_as_it_was_afterwards() -> None:
    module = Plain()
    before = {name: set(vars(layer)) for name, layer in module.named_modules()}
    fit(private(), module=module)
    with pytest.warns(UserWarning, match="new ledgers"), pytest.raises(RuntimeError, match="stop here"):
        fit(private(), module=module, callbacks=[Stops()])
    own = {"_trainer", "_hparams"}
    assert {name: set(vars(layer)) - own for name, layer in module.named_modules()} == {
        name: attributes - own for name, attributes in before.items()
    }
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())


class Stops(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("stop here")
