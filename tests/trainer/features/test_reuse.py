"""A strategy object goes through other hands: several Trainers, plug-ins, copies, pickles, registered names."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.strategies import one_package
from lightning_fl.strategies.checkpoint import WholeCheckpointIO
from tests.helpers.training import QUIET, Ordinary, Plain, image_clients, loader, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def fit(strategy: Any, max_epochs: int = 2, ckpt_path: Any = None, module: Any = None, **options: Any) -> L.Trainer:
    run = trainer(strategy, max_epochs, **options)
    run.fit(
        module or Plain(make_optimizer=partial(SGD, lr=0.1)),
        image_clients((8, 4, 4), validate=isinstance(module, Ordinary)),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return run


def trained(strategy: Any, **options: Any) -> Tensor:
    return weights(fit(strategy, **options).lightning_module)


SETTINGS: list[dict[str, Any]] = [
    {"engine": "sequential"},
    {"engine": "vectorized"},
    {"algorithm": "scaffold", "client_optimizer": "keep", "engine": "sequential"},
    {"algorithm": "fedadam", "personal": ["net.3.*"], "clients_per_round": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_object_serves_many_trainers(settings: dict[str, Any]) -> None:
    expected = trained(FederatedStrategy(**settings))
    strategy = FederatedStrategy(**settings)
    for accelerator in ("cpu", "auto", "cpu"):
        assert torch.equal(trained(strategy, accelerator=accelerator), expected)
        assert len(strategy.history) == 2


def test_each_trainer_has_its_own_settings() -> None:
    class OwnIO(TorchCheckpointIO):
        pass

    strategy = FederatedStrategy()
    first = fit(strategy, precision="bf16-mixed", plugins=[OwnIO()], gradient_clip_val=1.0)
    assert isinstance(first.strategy.checkpoint_io, OwnIO)
    second = fit(strategy)
    assert second.precision == "32-true"
    assert type(second.strategy.checkpoint_io) is WholeCheckpointIO
    assert isinstance(fit(first.strategy, plugins=[OwnIO()]).strategy.checkpoint_io, OwnIO)


def test_what_the_user_set_before_the_first_trainer_stays() -> None:
    strategy, io = FederatedStrategy(), TorchCheckpointIO()
    strategy.checkpoint_io = io
    for _ in range(2):
        assert fit(strategy).strategy.checkpoint_io is io


def test_the_callbacks_of_another_trainer_do_not_drive_the_rounds_twice() -> None:
    first = fit("fedavg")
    assert torch.equal(trained("fedavg", callbacks=list(first.callbacks)), weights(first.lightning_module))


@pytest.mark.parametrize(
    "dump", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.spread(3)
def test_copies_of_a_strategy_and_of_a_trainer_train_as_the_original(settings: dict[str, Any], dump: Any) -> None:
    strategy = FederatedStrategy(**settings)
    before = dump(strategy)
    run = fit(strategy, gradient_clip_val=1.0)
    expected = weights(run.lightning_module)
    after = dump(strategy)
    assert after.history == strategy.history
    for copied in (before, after, dump(after)):
        assert torch.equal(trained(copied, gradient_clip_val=1.0), expected)
    # A copy of the Trainer goes on as the Trainer itself does.
    other = dump(run)
    for one in (run, other):
        one.fit_loop.max_epochs = 4
        one.fit(one.strategy.lightning_module, image_clients((8, 4, 4)))
    assert torch.equal(weights(other.strategy.lightning_module), weights(run.lightning_module))
    assert len(other.strategy.history) == len(run.strategy.history) == 4


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_trainer_with_logged_metrics_is_copied_and_pickled(engine: str) -> None:
    run = fit(FederatedStrategy(engine=engine), module=Ordinary(), gradient_clip_val=1.0)
    for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert other.callback_metrics["loss"] == run.callback_metrics["loss"]


class CountingIO(TorchCheckpointIO):
    """Counts what it writes."""

    num_saved = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.num_saved += 1
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("make", [CountingIO, AsyncCheckpointIO, lambda: AsyncCheckpointIO(CountingIO())])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.spread(2)
def test_any_checkpoint_plugin_saves_what_resumes_exactly(make: Any, algorithm: str) -> None:
    def run(folder: str, ckpt_path: Any = None) -> tuple[CheckpointIO, Tensor]:
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        plugin, strategy = make(), FederatedStrategy(algorithm, clients_per_round=2)
        found = fit(strategy, 4, ckpt_path, plugins=[plugin], callbacks=[saver], enable_checkpointing=True)
        assert found.strategy.checkpoint_io is plugin
        return plugin, weights(found.lightning_module)

    plugin, whole = run("whole")
    base = getattr(plugin, "checkpoint_io", plugin)
    assert base.num_saved == 4 if isinstance(base, CountingIO) else type(base) is WholeCheckpointIO
    for last in range(3):
        path = f"whole/epoch={last}.ckpt"
        # What the threads write later must not be in it.
        assert len(torch.load(path, weights_only=True)["lightning_fl"]["history"]) == last + 1
        assert torch.equal(run("again", path)[1], whole)


def test_states_stay_until_a_checkpoint_in_the_background_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    saver = ModelCheckpoint("ckpt", save_top_k=1, save_last=True)
    strategy = FederatedStrategy("scaffold", clients_per_round=2)
    kept = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            kept.append(len(list(Path("ckpt/client_states").glob("versions/*/*"))))

    fit(strategy, 5, plugins=[AsyncCheckpointIO()], callbacks=[saver, Look()], enable_checkpointing=True)
    assert kept == sorted(kept)
    assert len(list(Path("ckpt/client_states").glob("versions/*/*"))) == 3


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The example of the documentation may have registered it in this process.
    StrategyRegistry.register("fed4", FederatedStrategy, description="4 clients", override=True, num_clients=4)
    yield
    StrategyRegistry.remove("fed4")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("way", ["name", "environment"])
def test_a_name_is_registered_with_settings(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "environment":
        monkeypatch.setenv("PL_TRAINER_STRATEGY", "fed4")
    run = L.Trainer(max_epochs=1, **QUIET, **({"strategy": "fed4"} if way == "name" else {}))
    run.fit(Plain(), loader(16))
    assert isinstance(run.strategy, FederatedStrategy)
    assert run.strategy.history[0]["num_clients"] == 4
    assert fl.FederatedStrategy is type(run.strategy)


# ---- pytorch_lightning beside lightning


@pytest.mark.parametrize("make", [lambda: "fedavg", lambda: FederatedStrategy(num_clients=10)], ids=["name", "object"])
def test_both_packages_train_modules_of_both(make: Any) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import EarlyStopping
    from pytorch_lightning.utilities.types import STEP_OUTPUT

    class Own(pl.LightningModule):
        training_step, configure_optimizers = Plain.training_step, Plain.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.make_optimizer = Plain().net, partial(SGD, lr=0.1)

    found = []
    for kind in (pl.Trainer, L.Trainer):
        for module in (Own(), Plain()):
            run = kind(strategy=make(), max_epochs=1, callbacks=[EarlyStopping("fl/round")], **QUIET)
            run.fit(module, loader(40))
            found.append(weights(module))
    assert all(torch.equal(one, found[0]) for one in found)
    assert STEP_OUTPUT is L.pytorch.utilities.types.STEP_OUTPUT


def test_the_modules_stay_what_they_are() -> None:
    import lightning_fabric
    import pytorch_lightning.trainer.states as states

    assert lightning_fabric is L.fabric
    assert states.__spec__.name == states.__name__ == "lightning.pytorch.trainer.states"
    importlib.reload(states)


def test_other_versions_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = one_package.OnePackage()
    assert finder.find_spec("pytorch_lightning.core", None) is not None
    assert finder.find_spec("pytorch_lightning_addons", None) is None
    monkeypatch.setattr(one_package, "version", lambda name: name)
    assert finder.find_spec("pytorch_lightning.core", None) is None


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``pytorch_lightning`` as a package of its own, as where it was imported before ``lightning_fl``."""

    def of_either() -> dict[str, Any]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in one_package.NAMES}

    united = of_either()
    finders = [finder for finder in sys.meta_path if not isinstance(finder, one_package.OnePackage)]
    monkeypatch.setattr(sys, "meta_path", finders)
    for name in united:
        del sys.modules[name]
    yield importlib.import_module("pytorch_lightning")
    for name in of_either():
        del sys.modules[name]
    sys.modules.update(united)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trainer_that_was_imported_first_says_what_to_write(apart: Any) -> None:
    assert apart is not L.pytorch
    with pytest.warns(UserWarning, match="Import lightning_fl first"):
        fl.strategies.register_strategies()
    for strategy in ("fedavg", "secagg", FederatedStrategy()):
        with pytest.raises(MisconfigurationException, match="Import lightning_fl first"):
            apart.Trainer(strategy=strategy, **QUIET)


def test_rooms_are_attributes() -> None:
    for room in ("algorithms", "cli", "data", "federation", "models", "strategies", "tracking"):
        assert getattr(fl, room) is importlib.import_module(f"lightning_fl.{room}")
        assert room in dir(fl)
    with pytest.raises(AttributeError, match="module 'lightning_fl' has no attribute 'nothing'"):
        _ = fl.nothing
