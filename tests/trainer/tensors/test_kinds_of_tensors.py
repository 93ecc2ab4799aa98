"""Tensors that are not plain float parameters: each is right, or refused by name with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils.data import TensorDataset

import lightning_fl as fl
from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.engines.tensors import check_tensors
from lightning_fl.privacy.noise import PrivacyError
from tests.helpers.training import trainer

ENGINES = pytest.mark.parametrize("engine", ["sequential", "auto"])
SIZES = (2, 2, 4)


class Base(L.LightningModule):
    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make_optimizer = make_optimizer or (lambda params: torch.optim.SGD(params, lr=0.05))
        self.build()

    def build(self) -> None:
        self.net = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def clients(inputs: Any = None) -> fl.datamodules.ClientDatasets:
    generator = torch.Generator().manual_seed(1)
    datasets = [
        TensorDataset(
            torch.randn(size, 4, generator=generator) if inputs is None else inputs(size, generator),
            torch.randn(size, 1, generator=generator),
        )
        for size in SIZES
    ]
    return fl.datamodules.ClientDatasets(datasets, batch_size=2, shuffle=False)


def fit(module: Base, algorithm: Any = "fedavg", rounds: int = 2, data: Any = None, **options: Any) -> Base:
    callbacks = options.pop("callbacks", None)
    own = trainer(fl.FederatedStrategy(algorithm, **options), rounds, callbacks=callbacks)
    own.fit(module, clients() if data is None else data)
    assert not own.strategy.history[-1]["refused"]
    return module


# ---- buffers


class MinMax(Base):
    in_place = False

    def build(self) -> None:
        super().build()
        self.register_buffer("low", torch.full((4,), float("inf")))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("last", torch.tensor(float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        low = torch.minimum(self.low, x.detach().amin(0))
        self.low = self.low.copy_(low) if self.in_place else low
        self.last = x.detach().mean()
        return super().forward(x)


@ENGINES
@pytest.mark.parametrize("in_place", [False, True])
def test_buffers_that_begin_as_infinity_or_nan_become_the_mean_of_what_clients_have(
    engine: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MinMax, "in_place", in_place)
    module = fit(MinMax(), rounds=1, engine=engine)
    data = [dataset.tensors[0] for dataset in clients()._train.values()]
    expected = sum(size * own.amin(0) for size, own in zip(SIZES, data, strict=True)) / sum(SIZES)
    torch.testing.assert_close(module.low, expected)
    torch.testing.assert_close(
        module.last, sum(size * own[-2:].mean() for size, own in zip(SIZES, data, strict=True)) / sum(SIZES)
    )
    assert module.mask.tolist() == [0.0, float("-inf")]
    again = fit(module, rounds=1, engine=engine)  # now they are numbers, and changes are averaged
    assert again.low.isfinite().all()


class ByClass(Base):
    """The minimum of each class, of which a client has some only."""

    def build(self) -> None:
        super().build()
        self.register_buffer("low", torch.full((3,), float("inf")))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label = batch
        for own, name in zip(x.detach()[:, 0], label.long(), strict=True):
            self.low[name] = torch.minimum(self.low[name], own)
        return self.net(x).square().mean()


def test_the_mean_is_over_the_clients_that_have_a_value() -> None:
    x = torch.tensor([[5.0, 0, 0, 0]])
    sets = [TensorDataset(x * (index + 1), torch.tensor([index % 2])) for index in range(3)]
    module = fit(ByClass(), rounds=1, data=fl.datamodules.ClientDatasets(sets))
    assert module.low.tolist() == [10.0, 10.0, float("inf")]  # the mean of 5 and 15; 10; nobody's


class Diverging(MinMax):
    def forward(self, x: Tensor) -> Tensor:
        self.low = self.low.mul(float("nan"))
        return self.net(x)


def test_what_becomes_nan_in_training_is_still_refused() -> None:
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        fit(Diverging())


class Growing(Base):
    def build(self) -> None:
        super().build()
        self.register_buffer("queue", torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.queue = torch.cat([self.queue, x.detach()])
        return super().forward(x)


@ENGINES
def test_a_buffer_that_changes_its_shape_is_named_or_stays_with_its_client(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape of the buffer 'queue' from \(0, 4\).*persistent=False.*personal="):
        fit(Growing(), engine=engine)
    own = trainer(fl.FederatedStrategy("fedavg", personal=["queue"], engine=engine), 3)
    own.fit(Growing(), clients())
    own.save_checkpoint(tmp_path / "last.ckpt")
    for client, size in enumerate(SIZES):
        assert len(fl.load_client(tmp_path / "last.ckpt", client)["queue"]) == 3 * size


class Counting(Base):
    def build(self) -> None:
        super().build()
        self.register_buffer("seen", torch.tensor(2**60 + 1))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("scales", torch.ones(3).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 3
        return super().forward(x)


@ENGINES
def test_large_integers_keep_their_last_digit_and_float8_travels(engine: str) -> None:
    sets = [TensorDataset(torch.randn(4, 4), torch.randn(4, 1)) for _ in range(3)]
    module = fit(Counting(), engine=engine, data=fl.datamodules.ClientDatasets(sets, batch_size=2))
    assert module.seen.item() == 2**60 + 1 + 2 * 2 * 3
    assert module.flag.tolist() == [True, False]
    assert module.scales.float().tolist() == [1.0] * 3
    assert module.scales.dtype == torch.float8_e4m3fn


# ---- parameters


class AsComplex(Base):
    def build(self) -> None:
        self.w = nn.Parameter(torch.view_as_complex(torch.randn(4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ torch.view_as_real(self.w)
        return y.square().sum(1, keepdim=True)


class AsPairs(Base):
    def build(self) -> None:
        self.w = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).square().sum(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:.*control variate is derived for plain SGD")
@pytest.mark.parametrize(
    "algorithm",
    [
        *("fedavg", "fedadam", "fedyogi", "fedadagrad", "fedprox", "scaffold", "feddyn", "fedexp", "fedavgm"),
        *("fednova", "qfedavg", "mimelite", fl.algorithms.MimeLite(beta2=0.9, tau=1.0)),
    ],
    ids=str,
)
@pytest.mark.spread(4)
def test_complex_parameters_are_pairs_of_real_ones(algorithm: Any) -> None:
    small = {"make_optimizer": lambda params: torch.optim.SGD(params, lr=0.002)}
    found, expected = fit(AsComplex(**small), algorithm), fit(AsPairs(**small), algorithm)
    torch.testing.assert_close(torch.view_as_real(found.w.detach()), expected.w.detach())


class Words(Base):
    def __init__(self, sparse: bool, make_optimizer: Any = None) -> None:
        self.sparse = sparse
        super().__init__(make_optimizer)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self).update({name: value}) if name == "sparse" else super().__setattr__(name, value)

    def build(self) -> None:
        self.words = nn.Embedding(10, 4, sparse=self.sparse)
        self.net = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.words(x).mean(1))


def sentences(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 10, (size, 3), generator=generator)


@pytest.mark.parametrize(
    "algorithm", ["fedavg", "fedprox", "scaffold", "feddyn", "mimelite", "ditto", "fednova", "qfedavg"]
)
@pytest.mark.spread(3)
def test_sparse_gradients_train_as_dense_ones(algorithm: str) -> None:
    found, expected = (fit(Words(sparse), algorithm, data=clients(sentences)) for sparse in (True, False))
    torch.testing.assert_close(found.words.weight, expected.words.weight)


def test_an_optimizer_for_sparse_gradients_only_is_refused_where_they_become_dense() -> None:
    def words_only(params: Iterator[Tensor]) -> Any:
        return torch.optim.SparseAdam([param for param in params if len(param) == 10])

    assert fit(Words(True, words_only), data=clients(sentences)).words.weight.isfinite().all()
    with pytest.raises(ValueError, match=r"sparse gradient of 'words.weight'.*SparseAdam"):
        fit(Words(True, words_only), "fedprox", data=clients(sentences))


class Lazy(Base):
    def build(self) -> None:
        self.net = nn.LazyLinear(1)


class Ragged(Base):
    def build(self) -> None:
        super().build()
        self.register_buffer("ragged", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))


class InSparse(Base):
    def build(self) -> None:
        super().build()
        self.register_buffer("graph", torch.eye(3).to_sparse())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*uninitialized parameters")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Lazy, "'net.weight' is lazy.*Run one batch"),
        (Ragged, "'ragged' is a nested tensor.*padded"),
        (InSparse, "'graph' is stored as torch.sparse_coo.*dense"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name(kind: type[Base], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(kind())


def test_a_tensor_spread_over_processes_is_refused_by_name(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        module = Base()
        mesh = init_device_mesh("cpu", (1,))
        module.net.weight = nn.Parameter(distribute_tensor(module.net.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"'net.weight' is a DTensor.*fully_shard"):
            check_tensors(module)
    finally:
        dist.destroy_process_group()


# ---- sample-level privacy


class Padded(Words):
    def build(self) -> None:
        self.words = nn.Embedding(10, 4, padding_idx=0)
        self.net = nn.Linear(4, 1)


class Ring(Base):
    def build(self) -> None:
        self.conv = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")
        self.net = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.conv(x.unsqueeze(1)).flatten(1))


class Bag(Words):
    def build(self) -> None:
        self.words = nn.EmbeddingBag(10, 4)
        self.net = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.words(x))


class Positions(Words):
    def build(self) -> None:
        super().build()
        self.places = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((self.words(x) + self.places(torch.arange(3)[None])).mean(1))


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize(
    ("make", "inputs", "message", "works"),
    [
        (lambda: Padded(False), sentences, r"padding_idx=0.*grad_sample_mode=.functorch", True),
        (Ring, None, r"padding_mode='circular'.*grad_sample_mode=.functorch", True),
        (lambda: Bag(False), sentences, r"EmbeddingBag.*nn.Embedding", False),
        (lambda: Positions(False), sentences, r"position ids.*expand", False),
    ],
    ids=["padding", "circular", "bag", "positions"],
)
@pytest.mark.spread(2)
def test_layers_without_per_sample_gradients_name_the_remedy(make: Any, inputs: Any, message: str, works: bool) -> None:
    pytest.importorskip("opacus")

    def private(**options: Any) -> None:
        dp = SampleLevelDP(noise_multiplier=1.0, delta=1e-3, **options)
        fit(make(), rounds=1, data=clients(inputs), engine="sequential", callbacks=[dp])

    with pytest.raises((MisconfigurationException, PrivacyError), match=message):
        private()
    if works:
        private(grad_sample_mode="functorch")
