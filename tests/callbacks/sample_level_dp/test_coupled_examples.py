"""Examples that move the gradients of others stop the run, wherever they do it; sound modules train undisturbed."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.datamodules import ClientLoaders
from lightning_fl.privacy import PrivacyError
from tests.helpers.coupled import SOUND, UNSOUND, Case
from tests.helpers.training import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def train(case: Case, rounds: int = 2, **options: Any) -> None:
    given = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "method": "rdp", **options}
    run = trainer("fedavg", rounds, callbacks=[SampleLevelDP(**given)], precision=case.precision)
    torch.manual_seed(0)
    run.fit(case.module(), case.clients())


@pytest.mark.parametrize("kind", UNSOUND)
@pytest.mark.spread(6)
def test_examples_that_touch_others_stop_the_run(kind: str) -> None:
    with pytest.raises(PrivacyError) as error:
        train(UNSOUND[kind])
    assert UNSOUND[kind].names in str(error.value)


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.spread(2)
def test_sound_modules_train(kind: str) -> None:
    train(SOUND[kind])


class Centred(L.LightningModule):
    """Subtracts the mean of the batch, by which examples touch others at any scale of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net((x - x.mean(0)) / x.std()), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Apart(Centred):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:Round .*hold NaN")
def test_an_example_of_nan_is_compared_with_itself() -> None:
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    data.tensors[0][3] = torch.nan
    run = trainer("fedavg", 4, callbacks=[SampleLevelDP(noise_multiplier=1.0, method="rdp")])
    run.fit(Apart(), ClientLoaders([DataLoader(data, 4)]))


@pytest.mark.parametrize(("scale", "precision"), [(1.0, "32-true"), (1e5, "32-true"), (1e5, "64-true")])
def test_features_so_large_that_rounding_may_be_the_reason_are_named(scale: float, precision: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    data = TensorDataset(
        scale * torch.randn(40, 4, generator=generator, dtype=dtype), torch.randint(0, 2, (40,), generator=generator)
    )
    run = trainer("fedavg", callbacks=[SampleLevelDP(noise_multiplier=1.0, method="rdp")], precision=precision)
    with pytest.raises(PrivacyError, match="depends on the others in its batch") as error:
        run.fit(Centred(), ClientLoaders([DataLoader(data, 8)]))
    names_scale = "Or it is rounding: the batch holds values up to" in str(error.value)
    assert names_scale == (scale > 1 and precision == "32-true")
    assert ("scale the features to about 1, or train with precision='64-true'" in str(error.value)) == names_scale
