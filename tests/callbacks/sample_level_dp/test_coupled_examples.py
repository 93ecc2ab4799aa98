"""Examples that move the gradients of others stop the run, wherever they do it; sound modules train undisturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_fl.callbacks import SampleLevelDP
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
def test_examples_that_touch_others_stop_the_run(kind: str) -> None:
    with pytest.raises(PrivacyError) as error:
        train(UNSOUND[kind])
    assert UNSOUND[kind].names in str(error.value)


@pytest.mark.parametrize("kind", SOUND)
def test_sound_modules_train(kind: str) -> None:
    train(SOUND[kind])
