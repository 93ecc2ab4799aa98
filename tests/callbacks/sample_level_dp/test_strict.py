"""``strict=True``: each gradient is that of one example by construction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.privacy import PrivacyError
from tests.helpers.coupled import (
    SOUND,
    UNSOUND,
    Case,
    Logs,
    Net,
    NormalisesOnTransfer,
    RunningMean,
    RunningMeanInAHook,
    RunningMeanInAnAttribute,
    examples,
)
from tests.helpers.privacy import fit, private
from tests.helpers.training import Plain, image_clients, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning_fl.privacy.InsecureNoiseWarning")


def train(case: Case, **options: Any) -> tuple[Any, Tensor]:
    callback = private(method="rdp", **options)
    run = trainer("fedavg", 2, callbacks=[callback], precision=case.precision)
    module = case.module()
    run.fit(module, case.clients())
    return run, weights(module)


def test_it_trains_what_the_hooks_train() -> None:
    found = []
    for strict, most in ((False, None), (True, None), (True, 5)):
        callback = private(insecure_test_seed=1, strict=strict, max_physical_batch_size=most)
        found.append(fit(callback, 2, Plain(), image_clients((30, 40), 10))[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-12)


def test_it_logs_what_the_hooks_log() -> None:
    logged = []
    for strict in (False, True):
        run, _ = train(Case(Logs), insecure_test_seed=1, strict=strict)
        logged.append({name: float(run.callback_metrics[name]) for name in ("loss", "accuracy")})
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


FITS = [
    kind for kind in SOUND if kind not in ("padding with a mask", "losses kept", "a counter", "scaling on transfer")
]


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.spread(4)
def test_sound_modules_train(kind: str) -> None:
    train(SOUND[kind], strict=True)


def moved(case: Case, clip: float = 0.05) -> float:
    """How far a step's sum moves if the last example is missing, in clip norms."""
    found = []
    for drop in (0, 1):
        data = examples(24, seed=3)
        order = data.tensors[1].argsort()
        x, y = data.tensors[0][order], data.tensors[1][order]  # the rare class last
        subset = torch.utils.data.TensorDataset(x[: 24 - drop], y[: 24 - drop])
        loader = DataLoader(subset, 24, **case.options)
        module = case.module()
        before = weights(module)
        callback = private(noise_multiplier=0.0, max_grad_norm=clip, strict=True)
        run = trainer("fedavg", 1, callbacks=[callback])
        with pytest.warns(UserWarning, match="NOT PRIVATE"):
            run.fit(module, fl.datamodules.ClientLoaders([loader]))
        found.append((weights(module) - before) * (24 - drop) / 0.1)
    return float((found[0] - found[1]).norm()) / clip


@pytest.mark.parametrize(
    "kind", ["class weights", "class weights of its own", "MixUp in collate_fn", "a penalty in every 4th step"]
)
def test_one_example_moves_the_sum_by_one_clip_norm_whatever_the_module_does(kind: str) -> None:
    assert moved(UNSOUND[kind]) <= 1 + 1e-4


class Penalised(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 10 * self.net[0].weight.square().sum()


def test_a_penalty_is_honoured() -> None:
    _, without = train(Case(Net), noise_multiplier=0.01, strict=True)
    _, found = train(Case(Penalised), noise_multiplier=0.01, strict=True)
    assert (found[: 6 * 16].norm() < 0.95 * without[: 6 * 16].norm()).item()


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Case(NormalisesOnTransfer), "on_after_batch_transfer"),
        (Case(RunningMean), "must not write to buffers"),
        (Case(RunningMeanInAnAttribute), "mean"),
        (Case(RunningMeanInAHook), "next (mean)"),
        (UNSOUND["padding to the longest, mean over time"], "pad all of them to one length"),
        (SOUND["losses kept"], "last"),
    ],
)
def test_what_can_not_be_alone_is_refused(case: Case, names: str) -> None:
    with pytest.raises((PrivacyError, MisconfigurationException, ValueError)) as error:
        train(case, strict=True)
    assert names in str(error.value)


def test_it_needs_no_mode_beside_it() -> None:
    with pytest.raises(ValueError, match="leave one out"):
        SampleLevelDP(noise_multiplier=1.0, strict=True, grad_sample_mode="functorch")
