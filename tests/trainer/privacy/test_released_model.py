"""Under differential privacy nothing but the server writes to the model between two rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl.privacy import PrivacyError
from tests.helpers.coupled import NUM_FEATURES, Net, Writes, examples
from tests.helpers.privacy import private
from tests.helpers.training import trainer

EXAMPLE = examples().tensors[0][7]


def fit(module: L.LightningModule, *callbacks: Any, privacy: str = "sample", rounds: int = 2, **options: Any) -> Any:
    transforms = [fl.privacy.ClientLevelDP(clip=1.0, noise_multiplier=1.0)] if privacy == "client" else []
    guard = [private(method="rdp")] if privacy == "sample" else []
    strategy = fl.FederatedStrategy("fedavg", transforms=transforms)
    run = trainer(strategy, rounds, callbacks=[*guard, *callbacks], **options)
    # One step a client and round: the last batch is the only one.
    run.fit(module, fl.datamodules.ClientLoaders([DataLoader(examples(), 60) for _ in range(2)]))
    return run


def holds_the_example(module: Net) -> bool:
    return torch.equal(module.net[0].bias.detach()[:NUM_FEATURES], EXAMPLE)


@pytest.mark.parametrize(
    ("hook", "at", "names"),
    [
        ("on_aggregate_end", 0, "on_aggregate_end"),
        ("on_train_epoch_end", 0, "at the epoch's end of round 0"),
        ("on_train_epoch_start", 1, "at the epoch's start"),
        ("on_train_end", 0, "on_train_end"),
    ],
)
@pytest.mark.parametrize("privacy", ["sample", "client"])
def test_what_a_hook_writes_after_a_round_is_put_back_and_stops_the_run(
    hook: str, at: int, names: str, privacy: str
) -> None:
    module = Net()
    with pytest.raises(PrivacyError, match=names) as error:
        fit(module, Writes(hook, at), privacy=privacy)
    assert "net.0.bias" in str(error.value)
    assert not holds_the_example(module)


def test_examples_are_kept_from_what_follows_the_last_batch() -> None:
    module = Net()
    with pytest.raises(PrivacyError, match=r"net.0.bias in on_train_batch_end, after the last batch of round 0"):
        fit(module, Writes("on_train_batch_end", 1))
    assert not holds_the_example(module)


def test_clients_are_kept_from_what_follows_the_last_batch() -> None:
    # A hook that belongs to training, such as that of a teacher, runs there too, so the run goes on.
    module = Net()
    with pytest.warns(UserWarning, match=r"changed 'net.0.bias' after the last batch of round 0.* It was put back"):
        fit(module, Writes("on_train_batch_end", 1), privacy="client", rounds=1)
    assert not holds_the_example(module)


class Replaces(L.Callback):
    """Puts an example where the next round would take it for the model's."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        bias = pl_module.net[0].bias
        value = torch.cat([EXAMPLE, bias.detach()[NUM_FEATURES:]])
        if self.how == "another parameter":
            pl_module.net[0].bias = nn.Parameter(value)
        elif self.how == "a new buffer":
            pl_module.net[0].register_buffer("seen", value)
        else:
            pl_module.net[2].bias.data[:] = EXAMPLE[:4]


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[2].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("how", "name"),
    [("another parameter", "net.0.bias"), ("a new buffer", "net.0.seen"), ("a frozen parameter", "net.2.bias")],
)
def test_nothing_can_take_the_place_of_the_model(how: str, name: str) -> None:
    with pytest.raises(PrivacyError, match=f"changed {name}"):
        fit(Frozen(), Replaces(how))


class SavesOnAnError(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def test_no_checkpoint_holds_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="before a checkpoint"):
        fit(
            Net(),
            Writes("on_train_epoch_end"),
            ModelCheckpoint(tmp_path, save_top_k=-1),
            SavesOnAnError(tmp_path / "error.ckpt"),
            enable_checkpointing=True,
        )
    (path,) = tmp_path.glob("*.ckpt")
    bias = torch.load(path, weights_only=True)["state_dict"]["net.0.bias"]
    assert path.name == "error.ckpt"
    assert not torch.equal(bias[:NUM_FEATURES], EXAMPLE)


def test_without_privacy_hooks_may_change_the_model() -> None:
    module = Net()
    fit(module, Writes("on_train_end"), privacy="none")
    assert holds_the_example(module)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0),
        lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    ],
    ids=["exponential", "stochastic"],
)
def test_what_averages_noisy_models_may(callback: Any) -> None:
    fit(Net(), callback(), privacy="client", rounds=4)
