"""How many clients train side by side, on a CPU and on a GPU; the GPU here is a number of bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fl.data.collation import IndexedTensors
from lightning_fl.data.lazy_batches import LazyBatch
from lightning_fl.engines import Vectorized, VectorizedEngine
from lightning_fl.engines.capture import tolerances
from lightning_fl.engines.device_memory import device_memory
from lightning_fl.engines.optimizer_states import OptimizerStates
from lightning_fl.engines.vectorized import engine as engine_module
from lightning_fl.engines.vectorized import grouping as grouping_module
from lightning_fl.engines.vectorized.grouping import Grouping
from lightning_fl.engines.vectorized.grouping_memory import GroupingMemory

GIB = 2**30


def grouping(features: int = 511, **settings: Any) -> Grouping:
    """For a model of ``features + 1`` MiB in steps of 2 KiB."""
    module = nn.Linear(features, 512)
    return Grouping(
        VectorizedEngine(module, OptimizerStates([torch.optim.SGD(module.parameters(), 0.1)])), Vectorized(**settings)
    )


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Lets engines take themselves to be on a GPU of 16 GiB; what is free there can be set."""
    memory = SimpleNamespace(total=16 * GIB, free=16 * GIB)
    monkeypatch.setattr(VectorizedEngine, "device", torch.device("meta"))
    for module in (engine_module, grouping_module):
        monkeypatch.setattr(module, "device_memory", lambda device: memory)
    return memory


def test_a_cpu_takes_what_its_cache_holds() -> None:
    assert device_memory(torch.device("cpu")) is None
    assert grouping().max_clients == 16
    assert grouping(stacked_bytes=GIB).max_clients == 1024
    assert grouping(clients_per_step=3).max_clients == 3


def test_a_gpu_takes_a_sixteenth_of_its_memory(on_gpu: SimpleNamespace) -> None:
    own = grouping()
    assert own.max_clients == 1024
    on_gpu.free = 9 * GIB
    assert own.max_clients == 1024
    assert own.memory == GroupingMemory()


def test_what_others_leave_free_is_decided_once(on_gpu: SimpleNamespace) -> None:
    on_gpu.free = GIB
    own = grouping()
    assert own.max_clients == 128
    assert grouping(clients_per_step=500).max_clients == 500
    # More is free later, but a resumed run must form the same groups.
    on_gpu.free = 16 * GIB
    assert own.max_clients == 128
    resumed = grouping()
    resumed.memory = GroupingMemory.unpack(own.memory.pack())
    assert resumed.max_clients == 128


def test_a_group_that_does_not_fit_is_halved(on_gpu: SimpleNamespace) -> None:
    own = grouping(clients_per_step=5)
    assert own.halve(range(5)) == [[0, 1, 2], [3, 4]]
    assert own.max_clients == 3
    news = own.memory.since(GroupingMemory())
    assert news.max_clients == 3
    assert own.memory.since(own.memory) == GroupingMemory()
    # Of several ranks, the one with the least memory decides.
    assert GroupingMemory(max_clients=2).with_(news).max_clients == 2
    assert GroupingMemory().with_(news).max_clients == 3


def test_large_clients_of_unequal_work_train_side_by_side_on_a_gpu_only(request: pytest.FixtureRequest) -> None:
    # The clients of NIID-Bench's Fashion-MNIST: batches of 64 in 10 epochs.
    works: dict[int | str, Any] = {
        client: (64,) * (10 * size // 64) for client, size in enumerate((3032, 4500, 5200, 5900, 6400, 10231))
    }
    assert len(grouping(2047).split(works)) == 6
    request.getfixturevalue("on_gpu")
    assert len(grouping(2047).split(works)) == 1


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2**-23), (torch.float64, 2**-52)])
def test_tolerances_are_those_of_dtype_and_device(dtype: torch.dtype, eps: float) -> None:
    assert tolerances(torch.ones(1, dtype=dtype), 3.0) == pytest.approx((1e3 * eps, 300 * eps))
    on_another = torch.ones(1, dtype=dtype, device="meta")
    assert tolerances(on_another, 3.0) == pytest.approx((1e4 * eps, 3e3 * eps))


def test_data_in_memory_stays_on_a_gpu_as_far_as_it_fits(
    on_gpu: SimpleNamespace,
) -> None:
    batches = [LazyBatch(IndexedTensors(torch.ones(4, 8)), np.array([0, 3]))]
    assert grouping().stack(batches, (0,)).content[0].device.type == "meta"
    on_gpu.free = 4 * 127  # a quarter of it is less than the data
    assert grouping().stack(batches, (0,)).content[0].device.type == "cpu"
    assert grouping(data_bytes=128).stack(batches, (0,)).content[0].device.type == "meta"
    assert grouping(data_bytes=0).stack(batches, (0,)).content[0].device.type == "cpu"
    with pytest.raises(ValueError, match="data_bytes=-1; expected at least 0"):
        Vectorized(data_bytes=-1)
