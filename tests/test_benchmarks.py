"""What the benchmarks time is what they say, and scripts that need a GPU run without one."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

import lightning_fl as fl
from lightning_fl.models import CharTransformer
from tests.helpers.distributed import REPOSITORY

SMALL: dict[str, dict[str, Any]] = {
    "W1": {"clients": 20, "examples": 23, "per_round": 6},
    "W1-unequal": {"clients": 60, "examples": 60, "per_round": 30},
    "transformer": {
        "network": lambda: CharTransformer(80, max_length=40, width=32, num_layers=1).net,
        **{"clients": 10, "examples": 12, "per_round": 4, "batch": 4},
    },
}


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("simulation")


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # what torch says of attention under vmap on a CPU
@pytest.mark.parametrize("name", SMALL)
def test_the_final_weights_are_those_of_the_plain_loop(simulation: ModuleType, name: str) -> None:
    work = replace(simulation.WORKLOADS[name], **SMALL[name])
    data = simulation.make_data(work)
    plain, wrong = simulation.PlainLoop(work, data), simulation.PlainLoop(replace(work, lr=0.9 * work.lr), data)
    clock, module = simulation.Clock(plain), simulation.Module(work)
    simulation.fit(module, work, data, 2, "vectorized", (clock,))
    assert [len(cohort) for cohort in clock.cohorts] == [work.per_round] * 2
    assert simulation.largest_difference(module, plain, clock.cohorts) <= simulation.TOLERANCE
    assert simulation.largest_difference(module, wrong, clock.cohorts) > 10 * simulation.TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft 0.21 in transformers 5.24
def test_a_billion_parameters_have_nine_megabytes_of_adapters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The size of benchmarks/language.py, which needs a GPU, and the script itself on a small model."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    language = importlib.import_module("language")
    with torch.device("meta"):
        module = fl.models.CausalLM(config=language.MODEL, lora=language.LORA)
    trained = [param for param in module.parameters() if param.requires_grad]
    assert sum(param.numel() for param in module.parameters()) == 1_102_301_184
    assert sum(param.numel() * param.element_size() for param in trained) == 9_011_200
    monkeypatch.setattr(language, "prepare_process", lambda num_threads: None)
    language.main(["--tiny", "--device", "cpu", "--steps", "1", "--rounds", "1", "--length", "8", "--batch", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[3:]] == [
        ["| without", "3 x 28,672"],
        ["| with", "3 x 28,672"],
    ]
