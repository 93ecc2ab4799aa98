"""What goes wrong in a federation: a client's data, a rank that dies or hangs, a signal."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.communication import RankLost
from tests.helpers.distributed import run_script
from tests.helpers.training import Plain, image_clients, loader, trainer, weights


class Breaks:
    """A loader that raises after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(loader(12)):
            if index == self.after:
                raise OSError("disk failed")
            yield batch


def no_loader() -> DataLoader:
    raise FileNotFoundError("no such file")


def clients(broken: Any, position: int) -> fl.datamodules.ClientLoaders:
    whole: list[Any] = [lambda seed=seed: loader(8, seed=seed) for seed in range(3)]
    if broken is not None:
        whole.insert(position, broken)
    names = ["a", "b", "c"]
    if broken is not None:
        names.insert(position, ["0", "aa", "z"][min(position, 2)] if position < 3 else "z")
    return fl.datamodules.ClientLoaders(dict(zip(names, whole, strict=True)))


@pytest.mark.parametrize("broken", [Breaks(0), Breaks(2), no_loader], ids=["at once", "half way", "no loader"])
@pytest.mark.parametrize("position", [0, 1, 3], ids=["first", "between", "last"])
def test_a_client_whose_loader_raises_is_left_out(broken: Any, position: int) -> None:
    module, without = Plain(), Plain()
    strategy = FederatedStrategy("fedavg", on_client_error="skip")
    with pytest.warns(UserWarning, match="the loader of client .* raised .*, so it was left out"):
        trainer(strategy, 2).fit(module, clients(broken, position))
    trainer("fedavg", 2).fit(without, clients(None, 0))
    torch.testing.assert_close(weights(module), weights(without), rtol=1e-12, atol=0)
    assert [len(entry["failed"]) for entry in strategy.history] == [1, 1]


@pytest.mark.parametrize("broken", [Breaks(1), no_loader], ids=["half way", "no loader"])
def test_a_client_whose_loader_raises_is_named(broken: Any) -> None:
    module = Plain()
    before = weights(module)
    with pytest.raises(ValueError, match=r"loader of client 'aa' raised .*on_client_error='skip'"):
        trainer("fedavg").fit(module, clients(broken, 1))
    assert torch.equal(weights(module), before)


def leave_out_on_ranks() -> tuple[torch.Tensor, list[Any]]:
    import warnings

    module = Plain()
    strategy = FederatedStrategy("fedavg", on_client_error="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(strategy, 2).fit(module, clients(Breaks(1), 3))
    return weights(module), [entry["failed"] for entry in strategy.history]


def test_ranks_agree_on_who_was_left_out(run_ranks: Any) -> None:
    alone, failed = leave_out_on_ranks()
    for found, also_failed in run_ranks(4, leave_out_on_ranks):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
        assert also_failed == failed == [["z"], ["z"]]


TIMEOUT = 6.0  # ranks come to a collective closer together than this, also on a busy machine


class Hangs(fl.callbacks.FederatedCallback):
    """In round 1, rank 1 does nothing until rank 0 has given up."""

    def __init__(self, gave_up: Path) -> None:
        self.gave_up = gave_up

    def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            while not self.gave_up.exists():
                time.sleep(0.1)
            raise KeyError("hung until rank 0 gave up")


def lose_rank_1(gave_up: Path) -> tuple[str, float]:
    module = Plain()
    strategy = FederatedStrategy("fedavg", timeout=TIMEOUT)
    start = time.monotonic()
    try:
        trainer(strategy, 3, callbacks=[Hangs(gave_up)]).fit(module, loader(8, seed=int(os.environ["RANK"])))
    except (RuntimeError, KeyError) as error:
        gave_up.touch()
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0.0


class LosesARank(L.Callback):
    """As when a rank dies in validation."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RankLost("Silo south has left.")


def test_a_rank_that_is_lost_outside_a_round() -> None:
    with pytest.raises(RankLost, match=r"^After round 1: Silo south has left\. Start all ranks .* `--ckpt_path last`"):
        trainer("fedavg", 3, callbacks=[LosesARank()]).fit(Plain(), image_clients((8, 8)))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_within_the_timeout(run_ranks: Any, tmp_path: Path) -> None:
    message, seconds = run_ranks(2, lose_rank_1, tmp_path / "gave_up")[0]
    assert message.startswith("RankLost: Round 1: Rank 1 has left the federation, or has not come")
    assert "`--ckpt_path last`" in message
    assert seconds < 3 * TIMEOUT


SCRIPT = """
import os, signal, sys
import lightning_fl as fl
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from tests.helpers.training import Plain, image_clients, trainer
from lightning_fl import FederatedStrategy
from lightning_fl.aggregation import WeightedMean

where, number, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
die = lambda: os.kill(os.getpid(), number)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it

class Dies(fl.callbacks.FederatedCallback):
    def on_client_end(self, trainer, module, client, run, update):
        if where == "training" and trainer.current_epoch == 2 and client == 1:
            die()

class DyingMean(WeightedMean):
    def result(self, acc, ctx):
        if where == "aggregating" and ctx.round == 2:
            die()
        return super().result(acc, ctx)

if where == "saving":
    import lightning.fabric.utilities.cloud_io as cloud_io
    import torch
    save, count = torch.save, 0
    def dying_save(*args, **kwargs):
        global count
        count += 1
        if count == 3:
            die()
        save(*args, **kwargs)
    torch.save = dying_save

saver = ModelCheckpoint(directory, filename="{epoch}", save_last=True)
callbacks = [Dies(), saver, OnExceptionCheckpoint(directory, "cut")]
strategy = FederatedStrategy("scaffold", aggregator=DyingMean())
fit = trainer(strategy, 5, enable_checkpointing=True, callbacks=callbacks)
fit.fit(Plain(), image_clients((5, 7, 11)))
print("not killed")
"""


def run_until_killed(tmp_path: Path, where: str, number: int) -> Any:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    return run_script(
        [sys.executable, "-W", "ignore", str(script), where, str(number), str(tmp_path)], cwd=tmp_path, check=False
    )


def resumed(checkpoint: Path) -> torch.Tensor:
    module = Plain()
    trainer("scaffold", 5).fit(module, image_clients((5, 7, 11)), ckpt_path=checkpoint, weights_only=True)
    return weights(module)


def uninterrupted() -> torch.Tensor:
    module = Plain()
    trainer("scaffold", 5).fit(module, image_clients((5, 7, 11)))
    return weights(module)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("where", ["training", "aggregating", "saving"])
@pytest.mark.spread(1)
def test_killed_anywhere_the_last_complete_round_is_there(tmp_path: Path, where: str) -> None:
    ended = run_until_killed(tmp_path, where, signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL
    assert torch.equal(resumed(tmp_path / "last.ckpt"), uninterrupted())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.spread(1)
def test_a_signal_drops_the_round_and_the_checkpoint_on_exception_resumes(tmp_path: Path, number: int) -> None:
    ended = run_until_killed(tmp_path, "training", number)
    assert "not killed" not in ended.stdout
    assert torch.equal(resumed(tmp_path / "cut.ckpt"), uninterrupted())


SILO_SCRIPT = """
import os, signal
import lightning_fl as fl
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.helpers.training import Plain, loader, trainer

class Dies(fl.callbacks.FederatedCallback):
    def on_client_end(self, trainer, module, client, run, update):
        if trainer.global_rank == 1 and trainer.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

saver = ModelCheckpoint("checkpoints", filename="{epoch}", save_last=True)
fit = trainer("fedavg", 5, enable_checkpointing=True, callbacks=[Dies(), saver])
fit.fit(Plain(), loader(8, seed=fit.global_rank))
"""


@pytest.mark.slow
def test_when_a_silo_dies_the_others_end_and_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SILO_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]

    def silo(rank: int) -> Any:
        words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *where, "--node-rank", str(rank)]
        env = {"LIGHTNING_FL_SILO_NAME": ("north", "south")[rank]}
        return run_script([*words, "train.py"], cwd=tmp_path, check=False, num_processes=2, env=env)

    with ThreadPoolExecutor() as pool:
        survivor, dead = pool.map(silo, range(2))
    assert "SIGKILL" in dead.stderr
    assert survivor.returncode == 1
    assert "RankLost: Round 2: Silo south has left the federation" in survivor.stderr
    assert "`--ckpt_path last`" in survivor.stderr
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


class SmallDisk:
    """A file system of 512 KiB on which others may leave little room.

    Args:
        path: Where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave(self, num_bytes: int) -> None:
        """Fills it but for ``num_bytes``."""
        free = shutil.disk_usage(self.path).free
        (self.path / "of others").write_bytes(bytes(free - num_bytes))

    def clear(self) -> None:
        """Gives the room back."""
        (self.path / "of others").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Needs the right to mount; where there is none, ``test_a_failing_disk_...`` alone has to do."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield SmallDisk(path)
    subprocess.run(["umount", path], check=True)


def fit_scaffold(directory: Path, max_epochs: int, **kwargs: Any) -> torch.Tensor:
    module = Plain()
    callback = ModelCheckpoint(directory, filename="{epoch}", save_last=True)
    run = trainer("scaffold", max_epochs, enable_checkpointing=True, callbacks=[callback])
    run.fit(module, image_clients((5, 7, 11)), **kwargs)
    return weights(module)


@pytest.mark.parametrize("room", [2 << 12, 6 << 12, 8 << 12], ids=["client state", "checkpoint", "second checkpoint"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:.*exists and is not empty")
@pytest.mark.spread(1)
def test_a_full_disk_leaves_the_last_checkpoint_whole(small_disk: SmallDisk, tmp_path: Path, room: int) -> None:
    expected = fit_scaffold(tmp_path / "elsewhere", 3)
    fit_scaffold(small_disk.path, 1)
    before = (small_disk.path / "last.ckpt").read_bytes()
    small_disk.leave(room)
    with pytest.raises(OSError, match="No space left"):
        fit_scaffold(small_disk.path, 3, ckpt_path=small_disk.path / "last.ckpt")
    assert (small_disk.path / "last.ckpt").read_bytes() == before
    assert not list(small_disk.path.rglob("*.unfinished"))
    for checkpoint in small_disk.path.glob("*.ckpt"):
        torch.load(checkpoint, weights_only=True)
    small_disk.clear()
    assert torch.equal(fit_scaffold(small_disk.path, 3, ckpt_path="last"), expected)


def test_a_failing_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_scaffold(tmp_path, 1)
    before = (tmp_path / "last.ckpt").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="exists and is not empty"):
        fit_scaffold(tmp_path, 2)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.rglob("*.unfinished"))
