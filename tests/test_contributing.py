"""The worked example of CONTRIBUTING.md, as a package that somebody has installed."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import StrategyRegistry

from lightning_fl.algorithms import Algorithm, FedAvg, get_algorithm, load_entry_points, registered
from lightning_fl.strategies import register_strategies
from tests.helpers.documents import install, named_blocks
from tests.helpers.training import minimise

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fl.algorithms.registry._ALGORITHMS", registered())
    for name in ("fedsign", "own"):
        monkeypatch.delitem(StrategyRegistry, name, raising=False)
        monkeypatch.setitem(StrategyRegistry, name, {})  # put back to nothing afterwards
        StrategyRegistry.pop(name)


def test_the_worked_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, found = time.process_time(), named_blocks(CONTRIBUTING)
    assert found.keys() == {"fedsign.py", "test_fedsign.py", "pyproject.toml"}
    entry_points = found["pyproject.toml"].replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")
    install(tmp_path / "site", {name: text for name, text in found.items() if name.endswith(".py")}, entry_points)
    monkeypatch.syspath_prepend(tmp_path / "site")
    load_entry_points()
    runpy.run_path(str(tmp_path / "site" / "test_fedsign.py"))["test_it_moves_by_the_sign_of_what_it_remembers"]()
    register_strategies()
    x = minimise("fedsign", 2, lr=0.05)  # by its name, as any other
    assert x == pytest.approx(10.0 - 2 * 0.01)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    from_yaml = parser.parse_object({"algorithm": {"class_path": "FedSign", "init_args": {"momentum": 0.5}}})
    assert parser.instantiate_classes(from_yaml).algorithm.momentum == 0.5
    assert repr(get_algorithm("fedsign")) == "FedSign(server_lr=0.01, momentum=0.9)"
    assert time.process_time() - start < 10


OWN = "from lightning_fl.algorithms import FedAvg\nclass Own(FedAvg): pass\nclass Other: pass\n"


def test_a_class_need_not_register_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", {"own_algorithms.py": OWN}, "[lightning_fl.algorithms]\nown = own_algorithms:Own\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    load_entry_points()
    load_entry_points()
    assert type(get_algorithm("own")).__name__ == "Own"


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("own = own_algorithms:Missing", r"Skipped the algorithm 'own' of fake: AttributeError.* Fix its entry point"),
        ("own = no_such_module:Own", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("own = own_algorithms:Other", r"own_algorithms:Other is not a subclass of fl\.algorithms\.Algorithm"),
        ("fedavg = own_algorithms:Own", "The algorithm name 'fedavg' is taken by FedAvg"),
    ],
    ids=["missing", "no module", "no algorithm", "taken"],
)
def test_one_that_cannot_be_loaded_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str, message: str
) -> None:
    install(tmp_path / "site", {"own_algorithms.py": OWN}, f"[lightning_fl.algorithms]\n{entry_point}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "own_algorithms", raising=False)
    with pytest.warns(UserWarning, match=message):
        load_entry_points()
    assert "own" not in registered()
    assert get_algorithm("fedavg") == FedAvg()
