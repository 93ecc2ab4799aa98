"""How processes are started: alone without knowing it, too many, or with different bases."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import types
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, mpi
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl.strategies import internals
from tests.helpers.distributed import REPOSITORY, run_script
from tests.helpers.training import QUIET, Plain, image_clients, loader, trainer, weights


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS"])
def test_a_process_of_several_that_trains_alone_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # otherwise Lightning itself finds the ranks of SLURM
    monkeypatch.setenv(variable, "1")
    trainer().fit(Plain(), image_clients((4, 4)))
    monkeypatch.setenv(variable, "2")
    with pytest.raises(MisconfigurationException, match=rf"{variable}=2.*pip install mpi4py"):
        trainer().fit(Plain(), image_clients((4, 4)))


def test_many_more_processes_than_cores_are_warned_of_before_they_start() -> None:
    num_cores = len(os.sched_getaffinity(0))
    with pytest.warns(UserWarning, match=rf"devices={32 * num_cores} starts .* on {num_cores} cores.*num_clients"):
        own = L.Trainer(strategy="fedavg", devices=32 * num_cores, **QUIET)
    assert isinstance(own.strategy.launcher, internals.SubprocessLauncher)
    L.Trainer(strategy="fedavg", devices=num_cores, **QUIET)


class WithBase(Plain):
    """A frozen base, which a rank may have loaded from elsewhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.base = nn.Linear(16, 64).to(torch.float64)
        self.base.requires_grad_(False)
        with torch.no_grad():
            self.base.weight.fill_(0.5)
            self.base.bias.zero_()
            self.base.weight[3, 3] = value
        self.head = nn.Linear(64, 4).to(torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.base(x.double().flatten(1))), y)


def with_base(own_value: bool, frozen: str) -> tuple[str, float, int]:
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(rank)  # the trainable parameters differ, and are made equal in any case
    module = WithBase(float(rank) if own_value else 0.0)
    run = trainer(fl.FederatedStrategy(frozen=frozen))
    try:
        run.fit(module, image_clients((4, 4)))
    except ValueError as error:
        return str(error), 0.0, 0
    return "", float(module.base.weight[3, 3]), run.strategy.history[0]["num_bytes"]


def test_different_bases_are_named_by_every_rank(run_ranks: Any) -> None:
    for error, *_ in run_ranks(2, with_base, True, "compare"):
        assert "'base.weight' of rank 1 has other values" in error
        assert 'frozen="broadcast"' in error


def test_equal_bases_do_not_travel_and_broadcast_ones_are_counted(run_ranks: Any) -> None:
    compared, sent = run_ranks(2, with_base, False, "compare"), run_ranks(2, with_base, True, "broadcast")
    size = 8 * (16 * 64 + 64)
    for (_, value, num_bytes), (error, other, more) in zip(compared, sent, strict=True):
        assert (error, value, other) == ("", 0.0, 0.0)
        assert more - num_bytes == size


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match="frozen='hash' is not known"):
        fl.FederatedStrategy(frozen="hash")


AGENT = "TORCHELASTIC_USE_AGENT_STORE"
"""The test's own process keeps the store, whatever starts the ranks."""


class RayEnvironment(LightningEnvironment):
    """What ``ray.train.lightning.RayLightningEnvironment`` overrides: Ray knows the ranks, and sets the address."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def world_size(self) -> int:
        return self.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.rank

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        pass


class Communicator:
    """What Lightning's ``MPIEnvironment`` asks of MPI, for ranks that know each other's address already."""

    def __init__(self, rank: int, size: int, address: str, port: int) -> None:
        self.rank, self.size, self.answers = rank, size, {str: address, int: port}

    def Get_size(self) -> int:
        return self.size

    def Get_rank(self) -> int:
        return self.rank

    def bcast(self, value: Any, root: int) -> Any:
        return self.answers.get(type(value), [socket.gethostname()])

    def gather(self, value: str, root: int) -> list[str] | None:
        return [value] * self.size if self.rank == root else None

    def Split(self, color: int, key: int = 0) -> Communicator:
        return self


def silos_of(launcher: str) -> tuple[int, list[Any], Tensor]:
    rank, size = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    options: dict[str, Any] = {}
    if launcher == "ray":
        options["plugins"] = [RayEnvironment(rank, size)]
    elif launcher == "slurm":  # finds its ranks by what srun sets; MASTER_ADDR and MASTER_PORT are those of the job
        options["devices"] = size
        own = {
            "NTASKS": size,
            "NTASKS_PER_NODE": size,
            "PROCID": rank,
            "LOCALID": rank,
            "NODEID": 0,
            "JOB_NAME": "fit",
            "JOB_ID": 7,
        }
        os.environ.update({f"SLURM_{name}": str(value) for name, value in own.items()})
        for name in [name for name in os.environ if name.startswith("TORCHELASTIC_") and name != AGENT]:
            del os.environ[name]  # so that Lightning does not find torchrun first
    else:
        world = Communicator(rank, size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        sys.modules["mpi4py"] = types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=world))  # type: ignore[assignment]
        mpi._MPI4PY_AVAILABLE = True
        options["plugins"] = [mpi.MPIEnvironment()]
        os.environ.pop("LOCAL_RANK", None)
    try:
        module, run = Plain(), trainer(fl.FederatedStrategy(), **options)
        run.fit(module, loader(seed=rank))
        return run.strategy.federation.size, run.strategy.history[0]["num_examples"], weights(module)
    finally:
        sys.modules.pop("mpi4py", None)
        mpi._MPI4PY_AVAILABLE = RequirementCache("mpi4py")


@pytest.mark.parametrize("launcher", ["ray", "mpi", "slurm"])
def test_each_rank_of_another_launcher_is_a_silo(run_ranks: Any, launcher: str) -> None:
    found = run_ranks(2, silos_of, launcher)
    assert [(size, examples) for size, examples, _ in found] == [(2, 48)] * 2
    assert torch.equal(found[0][2], found[1][2])


def has_mpi() -> bool:
    return shutil.which("mpirun") is not None and importlib.util.find_spec("mpi4py") is not None


@pytest.mark.slow
@pytest.mark.skipif(not has_mpi(), reason="needs mpirun (Debian: openmpi-bin) and mpi4py")
def test_mpirun_trains_the_model_of_torchrun(tmp_path: Path) -> None:
    found = importlib.util.find_spec("mpi4py")
    assert found is not None
    assert found.origin is not None
    path = os.pathsep.join([str(REPOSITORY), str(Path(found.origin).parents[1])])
    options = ["--config", str(REPOSITORY / "recipes" / "digits_silos.yaml"), "--data.init_args.shares=[1,1,1,3]"]
    fit = ["-m", "lightning_fl", "fit", *options, "--trainer.max_epochs", "2"]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "4", "python", *fit]
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", *fit]
    models = []
    for name, command, num_processes in (("mpirun", mpirun, 5), ("torchrun", torchrun, 5)):
        (tmp_path / name).mkdir()
        run_script(command, env={"PYTHONPATH": path}, cwd=tmp_path / name, num_processes=num_processes)
        (checkpoint,) = (tmp_path / name).glob("logs/digits_silos/*/checkpoints/last.ckpt")
        content = torch.load(checkpoint, weights_only=True)
        assert content["epoch"] == 1
        models.append(content["state_dict"])
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
