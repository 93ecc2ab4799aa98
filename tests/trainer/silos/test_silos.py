"""Silos of several processes: the same model as silos of one process with the joint batch."""

from __future__ import annotations

import os
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl
from lightning_fl.privacy.secagg.keys import KeyFolder
from lightning_fl.strategies.network import settings_of_silo
from tests.helpers.network import NAMES, live_coordinator, make_keys, make_kits, rules, settings
from tests.helpers.training import QUIET, images, measured, trainer, weights

SIZES = (32, 24)
BATCH = 8
VALIDATION = DataLoader(images(5, 9), 2)


class Net(L.LightningModule):
    """A network without random numbers, which logs, with the optimizer that a test asks for."""

    def __init__(self, make_optimizer: Callable[..., Any], norm: bool = False, dtype: Any = torch.float64) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.norm = norm
        self.own_dtype = dtype
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 4)]
            self.net = nn.Sequential(*layers[:2], *([nn.BatchNorm1d(7)] if self.norm else []), *layers[2:]).to(
                self.own_dtype
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x.to(self.own_dtype))
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("count", float(len(y)), reduce_fx="sum", on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x.to(self.own_dtype)), y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Sharded(Net):
    """The same, written for Lightning's ``ModelParallelStrategy``; 7 rows are uneven, and 4 rows on 4 are few."""

    def configure_model(self) -> None:
        super().configure_model()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=0.01)


CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedadam": {"algorithm": "fedadam"},
    "fedavgm": {"algorithm": "fedavgm"},
    "scaffold": {"algorithm": "scaffold"},
    "fedprox": {"algorithm": fl.algorithms.FedProx(mu=0.5)},
    "diloco": {"algorithm": "diloco", "local_steps": 3, "client_optimizer": "keep", "make_optimizer": adamw},
    "clipping": {"gradient_clip_val": 0.05},
    "accumulation": {"accumulate_grad_batches": 2},
}


def whole_weights(module: nn.Module) -> Tensor:
    tensors = module.state_dict().values()
    full = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in full])


def fit(case: str, silo: Any, rows_of: int, **more: Any) -> dict[str, Any]:
    """Two rounds of this process's silo, whose joint batch is of 8 examples."""
    settings = {**CASES[case], **more}
    kind = Sharded if isinstance(silo, fl.silos.FSDP2) else Net
    module = kind(settings.pop("make_optimizer", sgd))
    of_trainer = {n: settings.pop(n) for n in ("gradient_clip_val", "accumulate_grad_batches") if n in settings}
    strategy = fl.FederatedStrategy(settings.pop("algorithm", "fedavg"), silo=silo, **settings)
    run = trainer(strategy, max_epochs=2, **of_trainer)
    place = run.global_rank // (silo.ranks or 1)
    run.fit(module, DataLoader(images(SIZES[place], place), BATCH // rows_of), VALIDATION)
    return {
        "weights": whole_weights(module),
        "metrics": measured(run),
        "clients": [entry["num_clients"] for entry in strategy.history],
        "examples": [entry["num_examples"] for entry in strategy.history],
        "bytes": strategy.history[-1]["num_bytes"],
        "steps": run.global_step,
    }


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for one in found:
        torch.testing.assert_close(one["weights"], expected["weights"], rtol=1e-10, atol=1e-10)
        assert one["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
        assert one["clients"] == [2, 2]
        assert one["examples"] == [56, 56]
        assert one["steps"] == expected["steps"]


@pytest.mark.parametrize("case", ["scaffold", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES)])
def test_ddp_in_silos_is_one_process_with_the_joint_batch(run_ranks: Any, case: str) -> None:
    alone = run_ranks(2, fit, case, fl.silos.DDP(ranks=1), 1)
    found = run_ranks(4, fit, case, fl.silos.DDP(ranks=2), 2)
    assert_same(found, alone[0])
    # The first process of each silo sends what a silo of one process does, and the others nothing.
    assert [one["bytes"] for one in found[1::2]] == [0, 0]
    assert found[0]["bytes"] == pytest.approx(alone[0]["bytes"], rel=0.05)


@pytest.mark.parametrize("case", ["diloco", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES)])
def test_fsdp2_in_silos_is_one_process_with_the_joint_batch(run_ranks: Any, case: str) -> None:
    alone = run_ranks(2, fit, case, fl.silos.DDP(ranks=1), 1)
    found = run_ranks(4, fit, case, fl.silos.FSDP2(ranks=2), 2)
    assert_same(found, alone[0])
    # Each process sends its part; beside it the first one sends the messages.
    model = 8 * len(alone[0]["weights"])
    assert sum(one["bytes"] for one in found[:2]) == pytest.approx(alone[0]["bytes"], rel=0.05)
    num_models = 2 if case == "scaffold" else 1  # the control variates travel too
    assert 0.3 * num_models * model < found[1]["bytes"] < 0.7 * num_models * model


def fit_with_whole_updates(what: str, silo: Any, rows_of: int) -> dict[str, Any]:
    """With what needs whole updates, which each process of a silo has under DDP."""
    if what == "median":
        return fit("fedavg", silo, rows_of, aggregator=fl.aggregation.Median())
    if what == "compression":
        return fit("fedavg", silo, rows_of, transforms=[fl.compression.Compress(fl.compression.TopK(0.3))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.privacy.InsecureNoiseWarning)
        seed = 1 if what == "noise of a seed" else None
        private = fl.privacy.ClientLevelDP(clip=0.5, noise_multiplier=0.5, mode="local", insecure_test_seed=seed)
        return fit("fedavg", silo, rows_of, transforms=[private])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["median", "compression", "noise of a seed"])
def test_ddp_in_silos_leaves_updates_whole(run_ranks: Any, what: str) -> None:
    alone = run_ranks(2, fit_with_whole_updates, what, fl.silos.DDP(ranks=1), 1)
    assert_same(run_ranks(4, fit_with_whole_updates, what, fl.silos.DDP(ranks=2), 2), alone[0])


@pytest.mark.slow
def test_the_noise_of_a_silo_is_that_of_its_first_process(run_ranks: Any) -> None:
    for _ in range(2):
        found = [one["weights"] for one in run_ranks(4, fit_with_whole_updates, "noise", fl.silos.DDP(ranks=2), 2)]
        assert all(torch.equal(own, found[0]) for own in found)


def fit_three(keys: str, with_two: bool, secure: bool) -> dict[str, Any]:
    """Three silos, the first of which may be of two processes."""
    rank = int(os.environ["RANK"])
    place, ranks = (max(rank - 1, 0), 2 if rank < 2 else 1) if with_two else (rank, 1)
    module = Net(sgd)
    aggregator = fl.privacy.SecureAggregation(keys=keys, clip=4.0, aux_clip=64.0) if secure else None
    strategy = fl.FederatedStrategy("scaffold", aggregator=aggregator, silo=fl.silos.DDP(ranks=ranks))
    run = trainer(strategy, max_epochs=2)
    run.fit(module, DataLoader(images(16 + place, place), BATCH // ranks), VALIDATION)
    clients = [entry["num_clients"] for entry in strategy.history]
    return {"weights": whole_weights(module), "metrics": measured(run), "clients": clients}


def test_secure_sums_between_silos_of_which_one_has_two_processes(run_ranks: Any, tmp_path: Path) -> None:
    """Only the process that talks has a key; the other one is told the sum."""
    folders = [KeyFolder(tmp_path / f"silo{place}") for place in range(3)]
    public = [folder.create() for folder in folders]
    for folder in folders:
        folder.trust(public)
    plain = run_ranks(3, fit_three, "", False, False)[0]
    found = run_ranks(4, fit_three, str(tmp_path / "silo{rank}"), True, True)
    for one in found:
        assert torch.equal(one["weights"], found[0]["weights"])
        # A mean of three is rounded to multiples of 4 / (2^29 - 1).
        torch.testing.assert_close(one["weights"], plain["weights"], rtol=0, atol=1.5e-8 * 10)
        assert one["metrics"] == pytest.approx(plain["metrics"], rel=1e-6)
        assert one["clients"] == [3, 3]


DTYPES = {"32-true": torch.float64, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


def in_lightning(kind: type[Net], port: int, precision: Any) -> Tensor:
    """Lightning's own strategy for two processes, which meet at a port of their own."""
    # In the store of the workers Lightning's keys are the same in each check.
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    plain: Any = DDPStrategy(process_group_backend="gloo")
    if kind is Sharded:
        plain = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    module = kind(sgd, kind is Net, DTYPES[precision])
    run = trainer(plain, max_epochs=2, devices=2, precision=precision)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        run.fit(module, DataLoader(images(32, 0), 4, shuffle=True), VALIDATION)
    return whole_weights(module)


def in_one_silo(kind: type[Net], precision: Any) -> tuple[Tensor, dict[str, float]]:
    module = kind(sgd, kind is Net, DTYPES[precision])
    silo = fl.silos.DDP() if kind is Net else fl.silos.FSDP2()
    strategy = fl.FederatedStrategy("fedavg", silo=silo, client_optimizer="keep")
    run = trainer(strategy, max_epochs=2, precision=precision)
    run.fit(module, DataLoader(images(32, 0), 4, shuffle=True), VALIDATION)
    return whole_weights(module), measured(run)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (Net, "32-true"),
        pytest.param(Net, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(Sharded, "32-true", marks=pytest.mark.slow),
        pytest.param(Sharded, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(Sharded, "bf16-true", marks=pytest.mark.slow),
    ],
)
def test_one_silo_is_lightnings_own_strategy(run_ranks: Any, kind: type[Net], precision: Any) -> None:
    """DDP with BatchNorm, whose statistics are those of the first process, or FSDP2; and a shuffled loader."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plain = run_ranks(2, in_lightning, kind, port, precision)
    tolerance = 1e-10 if precision == "32-true" else 1e-6
    for found, metrics in run_ranks(2, in_one_silo, kind, precision):
        torch.testing.assert_close(found, plain[0], rtol=tolerance, atol=tolerance)
        assert metrics["count"] == 32


class Careless(Net):
    """Shows NaN to one process of a silo, in the second round."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.current_epoch == 1 and self.trainer.global_rank == 1:
            loss = loss * float("nan")
        return loss


class Blemished(Sharded):
    """One process's part of one parameter becomes NaN, in the last step of the second round."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.is_last = batch_idx == 1
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.is_last and self.trainer.current_epoch == 1 and self.trainer.global_rank == 1:
            self.net[1].bias.grad.to_local().fill_(float("nan"))


def fit_with_nan(kind: type[Net], silo: Any) -> tuple[list[Any], bool]:
    module = kind(sgd)
    strategy = fl.FederatedStrategy("fedavg", silo=silo)
    run = trainer(strategy, max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*hold NaN or Inf")
        run.fit(module, DataLoader(images(16, run.global_rank // 2), 4), VALIDATION)
    return [entry["refused"] for entry in strategy.history], bool(whole_weights(module).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "silo"), [(Careless, fl.silos.DDP(ranks=2)), (Blemished, fl.silos.FSDP2(ranks=2))])
def test_a_nan_in_one_process_refuses_its_silo(run_ranks: Any, kind: type[Net], silo: Any) -> None:
    """Under FSDP2 only one of the silo's processes can see it."""
    for refused, is_finite in run_ranks(4, fit_with_nan, kind, silo):
        assert refused == [[], [0]]
        assert is_finite


def fit_uneven() -> list[int]:
    """One silo of three processes and one of one."""
    rank = int(os.environ["RANK"])
    strategy = fl.FederatedStrategy("fedavg", silo=fl.silos.DDP(ranks=3 if rank < 3 else 1))
    run = trainer(strategy, max_epochs=2)
    run.fit(Net(sgd), DataLoader(images(31 if rank < 3 else 10, rank // 3), 4), VALIDATION)
    return [entry["num_examples"] for entry in strategy.history]


@pytest.mark.slow
def test_silos_of_different_sizes(run_ranks: Any) -> None:
    """31 rows over 3 processes: padded to 33 steps' worth, and still 31 examples."""
    assert run_ranks(4, fit_uneven) == [[41, 41]] * 4


class Killed(Net):
    """A process of the second silo that the system kills in the second round."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 1 and self.trainer.global_rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledPart(Killed, Sharded):
    """The same with parameters that are spread."""


def fit_killed(kind: type[Net], silo: Any) -> None:
    place = int(os.environ["RANK"]) // 2
    strategy = fl.FederatedStrategy("fedavg", silo=silo, silo_name=("north", "south")[place])
    trainer(strategy, max_epochs=2).fit(kind(sgd), DataLoader(images(16, place), 4), VALIDATION)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "silo"), [(Killed, fl.silos.DDP(ranks=2)), (KilledPart, fl.silos.FSDP2(ranks=2))])
def test_a_killed_process_is_named_as_its_silo(run_ranks: Any, kind: type[Net], silo: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_ranks(4, fit_killed, kind, silo)
    reports = str(caught.value).split("--- rank ")
    assert "process died" in reports[4]
    if kind is Killed:  # FSDP2's own collectives, which fail first there, know nothing of silos
        assert "Silo south, process 1 has left" in reports[3]
    for other in (1, 2):
        assert "Silo south has failed" in reports[other]


def save_and_resume(folder: Path, silo: Any, rows_of: int, max_epochs: int, path: Path | None) -> Tensor:
    kind = Sharded if isinstance(silo, fl.silos.FSDP2) else Net
    module = kind(adamw)
    run = L.Trainer(
        strategy=fl.FederatedStrategy("fedadam", silo=silo),
        max_epochs=max_epochs,
        callbacks=[ModelCheckpoint(folder, filename="saved")],
        **{**QUIET, "enable_checkpointing": True},
    )
    place = run.global_rank // (silo.ranks or 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        run.fit(module, DataLoader(images(SIZES[place], place), BATCH // rows_of), VALIDATION, ckpt_path=path)
    return whole_weights(module)


@pytest.mark.slow
def test_a_sharded_checkpoint_loads_plainly_and_goes_on_in_one_process_a_silo(run_ranks: Any, tmp_path: Path) -> None:
    spread, alone = fl.silos.FSDP2(ranks=2), fl.silos.DDP(ranks=1)
    expected = run_ranks(2, save_and_resume, tmp_path / "whole", alone, 1, 2, None)[0]
    after_one = run_ranks(4, save_and_resume, tmp_path / "spread", spread, 2, 1, None)[0]
    module = Net(adamw)
    module.configure_model()
    state = torch.load(tmp_path / "spread" / "saved.ckpt", weights_only=True)
    module.load_state_dict(state["state_dict"])
    torch.testing.assert_close(weights(module), after_one, rtol=0, atol=0)
    path = tmp_path / "spread" / "saved.ckpt"
    for silo, ranks, rows_of in ((alone, 2, 1), (spread, 4, 2)):
        for found in run_ranks(ranks, save_and_resume, tmp_path / f"after {ranks}", silo, rows_of, 2, path):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def coordinator_of(case: str, folder: Path) -> Any:
    """A coordinator for two rounds of the silos east and north."""
    make_kits(folder, ("east", "north"))
    own = {name: value for name, value in CASES[case].items() if name in ("local_steps", "client_optimizer")}
    strategy = fl.FederatedStrategy(CASES[case]["algorithm"], **own)
    rules_of_two = rules(silos=("east", "north"), rounds=2)
    return live_coordinator(folder, rules_of_two, settings(strategy.algorithm), settings_of_silo(strategy))


def become_launch(place: int, process: int, num_processes: int) -> None:
    """Makes this process one of a silo's own launch."""
    own = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ["TORCHELASTIC_RUN_ID"] += f" {place}"


def fit_over_network(
    address: str, folder: Path, case: str, silo: Any, num_processes: int = 2, rounds: int = 2
) -> dict[str, Any]:
    """The first half of the processes is the silo east, the others north; each silo is a launch of its own."""
    place, process = divmod(int(os.environ["RANK"]), num_processes)
    become_launch(place, process, num_processes)
    name = ("east", "north")[place]
    settings = {**CASES[case], "federation": address, "kit": folder / name, "silo": silo}
    module = (Sharded if isinstance(silo, fl.silos.FSDP2) else Net)(settings.pop("make_optimizer", sgd))
    strategy = fl.FederatedStrategy(settings.pop("algorithm", "fedavg"), **settings)
    run = trainer(strategy, max_epochs=rounds)
    run.fit(module, DataLoader(images(SIZES[place], place), BATCH // num_processes), VALIDATION)
    return {"weights": whole_weights(module), "clients": [entry["num_clients"] for entry in strategy.history]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "silo"),
    [
        ("scaffold", fl.silos.DDP()),
        ("diloco", fl.silos.DDP()),
        ("fedadam", fl.silos.FSDP2()),
        ("scaffold", fl.silos.FSDP2()),
        ("diloco", fl.silos.FSDP2()),
    ],
    ids=["scaffold-ddp", "diloco-ddp", "fedadam-fsdp2", "scaffold-fsdp2", "diloco-fsdp2"],
)
def test_silos_over_a_network_too(run_ranks: Any, tmp_path: Path, case: str, silo: Any) -> None:
    alone = run_ranks(2, fit, case, fl.silos.DDP(ranks=1), 1)[0]
    with coordinator_of(case, tmp_path) as live:
        for found in run_ranks(4, fit_over_network, live.address, tmp_path, case, silo):
            torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-9, atol=1e-9)
            assert found["clients"] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scaffold", "diloco"])
def test_a_silo_that_comes_back_with_another_number_of_processes_has_its_state(
    run_ranks: Any, tmp_path: Path, case: str
) -> None:
    alone = run_ranks(2, fit, case, fl.silos.DDP(ranks=1), 1)[0]
    with coordinator_of(case, tmp_path) as live:
        run_ranks(4, fit_over_network, live.address, tmp_path, case, fl.silos.FSDP2(), 2, 1)
        for found in run_ranks(2, fit_over_network, live.address, tmp_path, case, fl.silos.DDP(), 1):
            torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-9, atol=1e-9)


def fit_three_over_network(address: str, folder: Path) -> dict[str, Any]:
    """The silo east has the first two of four processes, north and south one each."""
    rank = int(os.environ["RANK"])
    place, process, size = max(rank - 1, 0), int(rank == 1), 2 if rank < 2 else 1
    become_launch(place, process, size)
    secure = fl.privacy.SecureAggregation("bonawitz", max_weight=32.0)
    strategy = fl.FederatedStrategy(
        "scaffold", aggregator=secure, federation=address, kit=folder / NAMES[place], silo=fl.silos.DDP()
    )
    module = Net(sgd)
    run = trainer(strategy, max_epochs=2)
    run.fit(module, DataLoader(images(16 + place, place), BATCH // size), VALIDATION)
    clients = [entry["num_clients"] for entry in strategy.history]
    return {"weights": whole_weights(module), "metrics": measured(run), "clients": clients}


@pytest.mark.slow
def test_secure_sums_over_a_network_with_a_silo_of_two_processes(run_ranks: Any, tmp_path: Path) -> None:
    plain = run_ranks(3, fit_three, "", False, False)[0]
    make_kits(tmp_path)
    make_keys(tmp_path)
    secure = fl.privacy.SecureAggregation("bonawitz", max_weight=32.0)
    strategy = fl.FederatedStrategy("scaffold", aggregator=secure)
    own = settings(strategy.algorithm, aggregator=secure)
    with live_coordinator(tmp_path, rules(rounds=2), own, settings_of_silo(strategy)) as live:
        found = run_ranks(4, fit_three_over_network, live.address, tmp_path)
    for one in found:
        assert torch.equal(one["weights"], found[0]["weights"])
        torch.testing.assert_close(one["weights"], plain["weights"], rtol=0, atol=1e-5)
        assert one["metrics"] == pytest.approx(plain["metrics"], rel=1e-4)
        assert one["clients"] == [3, 3]


# ---- refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"algorithm": "qfedavg", "silo": fl.silos.FSDP2()}, "QFedAvg needs its norm"),
        ({"algorithm": "fedexp", "silo": fl.silos.FSDP2()}, "FedExP needs its norm"),
        ({"algorithm": fl.algorithms.Scaffold(option=1), "silo": fl.silos.FSDP2()}, "Scaffold needs its norm"),
        ({"aggregator": fl.privacy.SecureAggregation(), "silo": fl.silos.FSDP2()}, "SecureAggregation needs"),
        ({"aggregator": fl.aggregation.Median(), "silo": fl.silos.FSDP2()}, "Median needs"),
        (
            {"transforms": [fl.privacy.ClientLevelDP(clip=1.0, noise_multiplier=1.0)], "silo": fl.silos.FSDP2()},
            "ClientLevelDP needs its norm",
        ),
        ({"num_clients": 3, "silo": fl.silos.DDP()}, "num_clients has no meaning"),
        ({"engine": "vectorized", "silo": fl.silos.DDP()}, "engine='vectorized' has no meaning"),
        ({"silo": "ddp"}, "expected fl.silos.DDP"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fl.FederatedStrategy(**settings)
    with pytest.raises(ValueError, match="at least 1"):
        fl.silos.DDP(ranks=0)


class OldKind(FullyShardedDataParallel):
    """A module that is wrapped in FSDP1, without the process group that it would need."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


@pytest.mark.parametrize("silo", [fl.silos.DDP(), fl.silos.FSDP2()], ids=["ddp", "fsdp2"])
def test_flat_parameters_are_refused_by_the_name_of_their_module(silo: Any) -> None:
    with pytest.raises(ValueError, match="encoder is wrapped in FullyShardedDataParallel"):
        silo.check_module(nn.ModuleDict({"encoder": OldKind()}))


def refused(silo: Any, module: Any, loaders: Any = None, **options: Any) -> str:
    try:
        run = trainer(fl.FederatedStrategy("fedavg", silo=silo), **options)
        run.fit(module, DataLoader(images(8), 4) if loaders is None else loaders, VALIDATION)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refusals_on_ranks() -> list[str]:
    rank = int(os.environ["RANK"])
    clients = fl.datamodules.ClientLoaders([DataLoader(images(8), 4)])
    stream = DataLoader(iter_dataset(), 4)
    return [
        refused(fl.silos.FSDP2(ranks=2), Net(sgd)),
        refused(fl.silos.DDP(ranks=2), Net(sgd), clients),
        refused(fl.silos.DDP(ranks=2), Net(sgd), stream),
        refused(fl.silos.DDP(ranks=1 + rank), Net(sgd)),
        refused(fl.silos.DDP(ranks=2), Skips(sgd)),
        refused(fl.silos.DDP(ranks=2), Net(sgd), callbacks=[fl.callbacks.SampleLevelDP(noise_multiplier=1.0)]),
    ]


class Skips(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def iter_dataset() -> Any:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(images(8))

    return Stream()


@pytest.mark.slow
def test_what_does_not_fit_is_refused_on_ranks(run_ranks: Any) -> None:
    for whole, clients, stream, sizes, skips, private in run_ranks(2, refusals_on_ranks):
        assert "'net.1.weight' is not sharded over the silo" in whole
        assert "names 1 clients" in clients
        assert "a stream, which processes can't share" in stream
        assert "their silos have [1, 2] processes" in sizes
        assert "returned None to skip a batch" in skips
        assert "each process would add noise of its own" in private


def spread_unequally() -> str:
    rank = int(os.environ["RANK"])
    return refused(fl.silos.FSDP2(ranks=2 if rank < 2 else 1), Sharded(sgd))


@pytest.mark.slow
def test_silos_of_different_sizes_have_no_equal_parts(run_ranks: Any) -> None:
    for told in run_ranks(3, spread_unequally):
        assert "The silos have [2, 1] processes" in told
