"""Ranks that no round waits for: the journal of their arrivals, replayed on a clock, and what a kill does to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import TCPStore

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.coordinator.audit import verify
from lightning_fl.coordinator.export import read_model
from lightning_fl.schedules import Buffered, FedAsync, Polynomial, Recorded
from tests.coordinator.test_buffered import Constant, Slowly
from tests.coordinator.test_training import loader_of, validation_of
from tests.helpers.distributed import PATIENCE, REPOSITORY, launches
from tests.helpers.network import NAMES
from tests.helpers.training import trainer

SCHEDULES: dict[str, Any] = {
    "fedbuff": Buffered(2, staleness=Polynomial(0.5), max_staleness=4),
    "fedasync": FedAsync(0.6, Polynomial(0.5)),
}


def train_rank(
    transport: str, case: str, root: str, rounds: int, callbacks: Any, options: Any = None, **of_trainer: Any
) -> Any:
    rank = int(os.environ["RANK"])
    module = Constant(torch.float64)
    strategy = FederatedStrategy(
        schedule=SCHEDULES[case], transport=transport, silo_name=NAMES[rank], timeout=PATIENCE, **(options or {})
    )
    ckpt_path = of_trainer.pop("ckpt_path", None)
    given = {"limit_val_batches": 0, "callbacks": callbacks, "default_root_dir": root, **of_trainer}
    fit = trainer(strategy, max_epochs=rounds, **given)
    fit.fit(module, loader_of(NAMES[rank]), validation_of(NAMES[rank]), ckpt_path=ckpt_path, weights_only=True)
    return module.state_dict(), fit.current_epoch, strategy.history


def replay(recorded: Recorded, options: Any = None) -> dict[str, torch.Tensor]:
    clients = fl.datamodules.ClientLoaders({name: loader_of(name) for name in NAMES})
    module = Constant(torch.float64)
    strategy = FederatedStrategy(schedule=recorded, engine="sequential", **(options or {}))
    fit = trainer(strategy, max_epochs=len(recorded.rounds), limit_val_batches=0)
    fit.fit(module, clients, validation_of(*NAMES))
    return module.state_dict()


def assert_same(one: Any, other: Any, personal: bool = False) -> None:
    for name, value in one.items():
        if not (personal and "net.4" in name):
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9)


def train_with_delay(transport: str, case: str, root: str, options: Any) -> Any:
    delay = 0.06 * (1 + int(os.environ["RANK"]))
    return train_rank(transport, case, root, 5, [Slowly(delay)], options)


@pytest.mark.parametrize(
    ("transport", "case", "options"),
    [
        ("gloo", "fedbuff", {}),
        pytest.param("rpc", "fedbuff", {}, marks=pytest.mark.slow),
        pytest.param("gloo", "fedasync", {}, marks=pytest.mark.slow),
        pytest.param("gloo", "fedbuff", {"algorithm": "scaffold", "personal": ["net.4.*"]}, marks=pytest.mark.slow),
    ],
)
def test_a_replay_of_the_journal_gives_the_model_of_the_ranks(
    run_ranks: Any, tmp_path: Path, transport: str, case: str, options: Any
) -> None:
    ranks = run_ranks(3, train_with_delay, transport, case, str(tmp_path), options)
    journal = tmp_path / "asynchronous" / "0"
    recorded = Recorded(str(journal), SCHEDULES[case])
    replayed = replay(recorded, options)
    ages = [index - visit.version for index, visits in enumerate(recorded.rounds) for visit in visits]
    assert max(ages) > 0  # somebody was not waited for
    assert_same(replayed, read_model(journal)[0], "personal" in options)
    for state, epoch, history in ranks:  # all end with the last model, also those that are not in the last round
        assert_same(replayed, state, "personal" in options)
        assert epoch == 5
        assert all("versions" in entry for entry in history)
    verify(journal / "audit.jsonl")
    # A replay that forgets from which version each has started gives another model.
    history = json.loads((journal / "state.json").read_text())["progress"]["history"]
    forgetful = [{"round": entry["round"], "members": entry["members"]} for entry in history]
    (tmp_path / "state.json").write_text(json.dumps({"progress": {"history": forgetful}}))
    other = replay(Recorded(str(tmp_path)), options)
    assert not torch.allclose(other["net.0.weight"], replayed["net.0.weight"], rtol=1e-6)


# ---- kill -9

ROUNDS = 12


class Scene(fl.callbacks.FederatedCallback):
    """South stops in its second visit until it is killed; from round 7 on east waits until it is back."""

    def __init__(self, root: Path) -> None:
        self.root, self.name, self.visits = root, NAMES[int(os.environ["RANK"])], 0

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        time.sleep(0.02)
        self.visits += 1
        if self.name == "south" and "again" in sys.argv:
            (self.root / "back").touch()
        elif self.name == "south" and self.visits == 2:
            (self.root / "stuck").touch()
            time.sleep(PATIENCE)
        elif self.name == "east" and trainer.current_epoch >= 7:
            wait_for(self.root / "back")


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"never came: {path.name}"
        time.sleep(0.02)


def scene(root: str) -> None:
    """One rank, in a process of its own."""
    transport = "rpc" if "rpc" in sys.argv else "gloo"
    state, epoch, _ = train_rank(transport, "fedbuff", root, ROUNDS, [Scene(Path(root))])
    torch.save((state, epoch), Path(root, f"{os.environ['RANK']}.pt"))


def start(root: Path, port: int, rank: int, *words: str, scene: str = "scene") -> subprocess.Popen[bytes]:
    code = f"import sys; from tests.trainer.ranks.test_asynchronous import {scene}; {scene}(sys.argv[1])"
    launches.append(f"rank {rank}")
    variables = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launcher = {"TORCHELASTIC_RUN_ID": "kill", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": 0}
    own = {name: str(value) for name, value in {**variables, **launcher}.items()}
    with (root / f"{rank}.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(root), *words],
            cwd=REPOSITORY,
            env={**os.environ, **own, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
def test_a_killed_rank_comes_back_and_the_journal_is_replayed(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps it
    ranks = [start(tmp_path, store.port, rank) for rank in range(3)]
    try:
        wait_for(tmp_path / "stuck")
        ranks[2].send_signal(signal.SIGKILL)
        assert ranks[2].wait(PATIENCE) == -signal.SIGKILL
        ranks[2] = start(tmp_path, store.port, 2, "again")
        codes = [process.wait(PATIENCE) for process in ranks]
        assert codes == [0, 0, 0], (tmp_path / "0.log").read_text() + (tmp_path / "2.log").read_text()
    finally:
        for process in ranks:
            process.kill()
    assert "Silo south is lost" in (tmp_path / "0.log").read_text()
    journal = tmp_path / "asynchronous" / "0"
    recorded = Recorded(str(journal), SCHEDULES["fedbuff"])
    replayed = replay(recorded)
    by_south = [index for index, visits in enumerate(recorded.rounds) if "south" in {v.client for v in visits}]
    assert len(recorded.rounds) == ROUNDS
    assert by_south[0] < 7 <= by_south[-1]  # before the kill, and after it
    assert_same(replayed, read_model(journal)[0])
    for rank in range(3):
        state, epoch = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert_same(replayed, state)
        assert epoch == ROUNDS


@pytest.mark.slow
def test_over_rpc_a_killed_rank_is_refused_and_the_others_train_on(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [start(tmp_path, store.port, rank, "rpc") for rank in range(3)]
    try:
        wait_for(tmp_path / "stuck")
        ranks[2].send_signal(signal.SIGKILL)
        assert ranks[2].wait(PATIENCE) == -signal.SIGKILL
        ranks[2] = start(tmp_path, store.port, 2, "rpc", "again")
        assert ranks[2].wait(PATIENCE) == 1
        assert "Rank 2 has been restarted, but torch.distributed.rpc" in (tmp_path / "2.log").read_text()
        (tmp_path / "back").touch()  # east waits for it
        assert [process.wait(PATIENCE) for process in ranks[:2]] == [0, 0], (tmp_path / "0.log").read_text()
    finally:
        for process in ranks:
            process.kill()
    journal = tmp_path / "asynchronous" / "0"
    recorded = Recorded(str(journal), SCHEDULES["fedbuff"])
    assert len(recorded.rounds) == ROUNDS
    assert_same(replay(recorded), read_model(journal)[0])


def scene_of_restart(root: str) -> None:
    """One rank, which goes on from the last checkpoint if there is one."""
    folder = Path(root, "checkpoints")
    keep = ModelCheckpoint(folder, save_last=True, every_n_epochs=3)
    last = folder / "last.ckpt"
    rank = int(os.environ["RANK"])
    ckpt_path = str(last) if "again" in sys.argv and rank < 2 else None  # only the first rank needs it
    own = train_rank(
        "gloo",
        "fedbuff",
        root,
        ROUNDS,
        [Slowly(0.05 * (1 + rank)), keep],
        {"algorithm": "scaffold"},
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
    )
    torch.save(own[:2], Path(root, f"{rank}.pt"))


def rounds_done(journal: Path) -> int:
    try:
        return len(json.loads((journal / "state.json").read_text())["progress"]["history"])
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_run_whose_first_rank_was_killed_goes_on_with_its_journal(tmp_path: Path) -> None:
    journal, killed_at = tmp_path / "asynchronous" / "0", 5
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [start(tmp_path, store.port, rank, scene="scene_of_restart") for rank in range(3)]
    try:
        end = time.monotonic() + PATIENCE
        while rounds_done(journal) < killed_at:
            assert time.monotonic() < end, (tmp_path / "0.log").read_text()
            time.sleep(0.01)
        ranks[0].send_signal(signal.SIGKILL)
        assert ranks[0].wait(PATIENCE) == -signal.SIGKILL
        assert all(process.wait(PATIENCE) == 1 for process in ranks[1:])
        assert all(
            "Rank 0, which holds the model, has left" in (tmp_path / f"{rank}.log").read_text() for rank in (1, 2)
        )
        done = rounds_done(journal)
        again = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [start(tmp_path, again.port, rank, "again", scene="scene_of_restart") for rank in range(3)]
        codes = [process.wait(PATIENCE) for process in ranks]
        assert codes == [0, 0, 0], (tmp_path / "0.log").read_text() + (tmp_path / "2.log").read_text()
    finally:
        for process in ranks:
            process.kill()
    recorded = Recorded(str(journal), SCHEDULES["fedbuff"])
    assert done < len(recorded.rounds) == ROUNDS
    assert not (tmp_path / "asynchronous" / "1").exists()
    replayed = replay(recorded, {"algorithm": "scaffold"})
    assert_same(replayed, read_model(journal)[0])
    for rank in range(3):
        state, epoch = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert_same(replayed, state)
        assert epoch == ROUNDS
    verify(journal / "audit.jsonl")


# ---- errors and settings


def fail_on_rank_0(root: str) -> str:
    class Failing(Slowly):
        def on_client_end(self, trainer: Any, *args: Any) -> None:
            if os.environ["RANK"] == "0":
                raise OSError("the disk of rank 0 is gone")

    try:
        train_rank("gloo", "fedbuff", root, 5, [Failing(0.0)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.slow
def test_the_others_are_told_when_rank_0_fails(run_ranks: Any, tmp_path: Path) -> None:
    first, *others = run_ranks(3, fail_on_rank_0, str(tmp_path))
    assert first == "OSError: the disk of rank 0 is gone"
    assert all("Rank 0, which keeps the model, has failed: the disk of rank 0 is gone" in own for own in others)


def test_one_process_is_refused() -> None:
    own = trainer(FederatedStrategy(schedule=Buffered(1), transport="gloo"), limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="joins several ranks, but there is one"):
        own.fit(Constant(torch.float64), loader_of("east"), validation_of("east"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "give schedule"),
        ({"schedule": fl.schedules.Deadline(10)}, "simulated clock"),
        ({"schedule": Buffered(2), "durations": {0: 1.0}}, "durations"),
        ({"schedule": Buffered(2, concurrency=2)}, "concurrency"),
        ({"schedule": Buffered(2), "num_clients": 4}, "num_clients"),
        ({"schedule": Buffered(2), "transforms": [fl.compression.LowRank(1)]}, "weights each update by its staleness"),
        ({"schedule": Buffered(2), "aggregator": fl.privacy.SecureAggregation("bonawitz")}, "different versions"),
        ({"schedule": Buffered(2), "silo": fl.silos.DDP()}, "schedule"),
        ({"schedule": Buffered(2), "federation": "https://localhost", "kit": "kit"}, "federation"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FederatedStrategy("fedavg", transport="gloo", **options)
