"""Silos without a centre: each sends its model to its neighbours and to nobody else."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.topologies import Complete, Edges, Exponential, Graph, Lazy, Random, Ring, Swarm
from lightning_fl.topologies import Path as Line
from lightning_fl.types import Aggregate
from tests.helpers.distributed import run_script
from tests.helpers.training import Plain, Quadratic, images, trainer, weights

E = (0.0, 1.0, 4.0, -2.0)
H = (1.0, 2.0, 0.5, 1.0)
DIRECTED = Graph([(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)], directed=True)
CASES: dict[str, tuple[str, Any]] = {
    "ring": ("dsgd", Ring()),
    "d2": ("d2", Lazy(Ring())),
    "tracking": ("gradienttracking", Line()),
    "push-sum": ("pushsum", DIRECTED),
    "varying": ("dsgd", Random(0.5)),
    "one peer": ("dsgd", Exponential(one_peer=True)),
    "edges": ("dsgd", Edges([[0, 1], [2, 3]], edge_rounds=3)),
    "complete": ("fedavg", Complete()),
}


def quadratic(rank: int) -> DataLoader[Any]:
    data = TensorDataset(torch.tensor([E[rank]]).double(), torch.tensor([H[rank]]).double())
    return DataLoader(data, batch_size=1)


def expected(case: str, size: int, rounds: int) -> tuple[list[float], float]:
    """The nodes by the recursion on all rows in one process."""
    name, topology = CASES[case]
    algorithm = FederatedStrategy(name, topology=topology).algorithm
    assert isinstance(algorithm, fl.algorithms.Decentralized)
    e, h = torch.tensor(E[:size]).double(), torch.tensor(H[:size]).double()
    p = torch.full((size,), 1 / size).double()
    state = algorithm.server_init({"x": torch.full((1,), 10.0).double()}, size)
    for _ in range(rounds):
        x = state["nodes"]["x"][:, 0]
        deltas = {"x": (0.1 * h * (e - x))[:, None]}
        state = algorithm.server_update(state, Aggregate({}, {}, 1.0, {}, size, size, nodes=deltas, node_weights=p))
    return state["nodes"]["x"][:, 0].tolist(), float(state["params"]["x"])


class Seen(fl.callbacks.FederatedCallback):
    """What a round leaves in the module before anything asks for the mean."""

    def __init__(self) -> None:
        self.models: list[float] = []

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
        self.models.append(float(module.x.detach()))


def silo(case: str, rounds: int = 4) -> Any:
    rank = int(os.environ["RANK"])
    name, topology = CASES[case]
    seen, module = Seen(), Quadratic()
    strategy = FederatedStrategy(name, topology=topology, local_steps=1)
    trainer(strategy, rounds, callbacks=[seen]).fit(module, quadratic(rank))
    nodes = strategy.active_driver.state.server["nodes"]["x"].flatten().tolist()
    return seen.models[-1], nodes, float(module.x.detach()), strategy.history[-1]


@pytest.mark.parametrize(
    ("case", "size"),
    [("ring", 2), *((case, 4) for case in CASES)],
)
@pytest.mark.spread(1)
def test_silos_do_what_the_recursion_on_all_rows_says(run_ranks: Any, case: str, size: int) -> None:
    nodes, mean = expected(case, size, 4)
    found = run_ranks(size, silo, case)
    assert [own for own, *_ in found] == pytest.approx(nodes, rel=1e-10)
    for _, all_nodes, model, entry in found:
        assert all_nodes == pytest.approx(nodes, rel=1e-10)  # joined when the training has ended
        assert model == pytest.approx(mean, rel=1e-10)
        assert {"consensus", "rho"} <= entry.keys()
    if size > 2 and case != "complete":
        assert len({round(own, 6) for own, *_ in found}) > 1


def validated(root: str, ckpt: str | None = None) -> Any:
    """Looks at the mean after the second and the fourth round only, which are saved."""
    rank = int(os.environ["RANK"])
    module, strategy = Plain(), FederatedStrategy("gradienttracking", topology=Ring())
    callback = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1, every_n_epochs=2)
    fit = trainer(strategy, 4, callbacks=[callback], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        fit.fit(module, DataLoader(images(5 + 9 * rank, seed=rank), batch_size=4, shuffle=True), ckpt_path=ckpt)
    state = strategy.active_driver.state.server
    return weights(module), {key: state[key] for key in ("nodes", "tracker", "last_deltas")}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_resumed_run_is_the_same_bit_for_bit(run_ranks: Any, tmp_path: Path, size: int) -> None:
    whole = run_ranks(size, validated, str(tmp_path))
    resumed = run_ranks(size, validated, str(tmp_path), str(tmp_path / "epoch=1.ckpt"))
    for (model, state), (again, other) in zip(whole, resumed, strict=True):
        assert torch.equal(model, again)
        torch.testing.assert_close(state, other, rtol=0, atol=0)


# ---- what the kernel counts


class Large(Quadratic):
    """One number that matters, and many more that travel with it."""

    SIZE = 500_000

    def __init__(self) -> None:
        super().__init__()
        self.rest = torch.nn.Parameter(torch.zeros(self.SIZE))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.rest.sum()


def large(case: str, rounds: int) -> None:
    name, topology = CASES[case] if case in CASES else ("fedavg", Swarm())
    strategy = FederatedStrategy(name, topology=topology, local_steps=1)
    trainer(strategy, rounds).fit(Large(), quadratic(int(os.environ["RANK"])))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs network namespaces")
@pytest.mark.parametrize(("case", "models"), [("ring", 4 * 2), ("complete", 4 * 3), ("swarm", 2 * 3)])
def test_the_kernel_counts_degree_times_model(tmp_path: Path, case: str, models: int) -> None:
    """Four silos alone in a network namespace: what its interface has carried in all, handshakes and headers included,
    in 6 rounds less that in 2, of which both end with one gathering of all models."""

    def carried(rounds: int) -> int:
        code = f"from tests.trainer.silos.test_neighbours import *; large({case!r}, {rounds})"
        (tmp_path / "silo.py").write_text(code)
        launch = "torch.distributed.run --nproc_per_node 4 --master_addr 127.0.0.1 --master_port 29500 silo.py"
        words = f"ip link set lo up && {sys.executable} -m {launch} >&2 && grep lo: /proc/net/dev"
        found = run_script(["unshare", "-rn", "sh", "-c", words], cwd=tmp_path, num_processes=5)
        return int(found.stdout.split()[9])  # bytes sent

    a_round = (carried(6) - carried(2)) / 4 / (4 * Large.SIZE)
    assert models <= a_round < 1.02 * models + 0.02
