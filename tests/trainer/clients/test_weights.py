"""A client weighs the examples that one pass of its loader yields, whatever its batches look like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

import lightning_fl as fl
from lightning_fl.data.client_loaders import batch_size
from tests.helpers.training import Quadratic, trainer, weights


class Graph:
    """A graph, or several joined to one as graph libraries do: none of its tensors counts the graphs."""

    def __init__(self, e: Tensor, nodes: Tensor) -> None:
        self.e, self.nodes = e, nodes

    def __iter__(self) -> Iterator[Any]:
        return iter((("e", self.e), ("x", self.nodes)))

    @staticmethod
    def join(graphs: list[Graph]) -> Graph:
        return Graph(torch.stack([graph.e for graph in graphs]).mean(), torch.cat([graph.nodes for graph in graphs]))


class Graphs(Dataset):
    def __init__(self, e: float, num_nodes: int, size: int = 4) -> None:
        self.e, self.num_nodes, self.size = e, num_nodes, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Graph:
        return Graph(torch.tensor(self.e, dtype=torch.float64), torch.zeros(self.num_nodes, 3))


class GraphStream(IterableDataset):
    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs

    def __iter__(self) -> Iterator[Graph]:
        return (self.graphs[index] for index in range(len(self.graphs)))


@dataclass
class InTurn:
    """A batch sampler of a user: batches of uneven size, without a length and without a sampler inside."""

    size: int

    def __iter__(self) -> Iterator[list[int]]:
        yield [0]
        yield list(range(1, self.size))


class OnGraphs(Quadratic):
    logged_size: int | None = None
    on_epoch = True

    def training_step(self, batch: Graph, batch_idx: int) -> Tensor:
        loss = 0.5 * (self.x - batch.e) ** 2
        if self.logged_size is not None:
            self.log("loss", loss, batch_size=self.logged_size, on_step=not self.on_epoch, on_epoch=self.on_epoch)
        return loss.sum()


class LooksAtBatches(Callback):
    def on_train_batch_end(self, *args: Any) -> None: ...


# Two clients whose graphs have 3 and 40 nodes, and wish to go to 0 and 1: with equal weights their mean is 1/2.
def _loaders(kind: str, num_examples: Any = None, sizes: tuple[int, int] = (4, 4)) -> fl.datamodules.ClientLoaders:
    def make(client: int) -> Any:
        graphs = Graphs(float(client), (3, 40)[client], sizes[client])
        if kind == "own batch sampler":
            return DataLoader(graphs, batch_sampler=InTurn(len(graphs)), collate_fn=Graph.join)
        if kind == "batches as samples":
            sampler = BatchSampler(SequentialSampler(graphs), 2, drop_last=False)
            return DataLoader(_Whole(graphs), sampler=sampler, batch_size=None)
        return DataLoader(GraphStream(graphs), batch_size=2, collate_fn=Graph.join)

    return fl.datamodules.ClientLoaders(range(2), make, num_examples=num_examples)


class _Whole(Dataset):
    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, indices: list[int]) -> Graph:
        return Graph.join([self.graphs[index] for index in indices])


def _share_of_second(loaders: Any, callbacks: Any = (), **attributes: Any) -> float:
    """The weight of client 1, as a share."""
    module = OnGraphs(start=0.0, lr=1.0)  # one step takes a client to where it wants to be
    vars(module).update(attributes)
    trainer("fedavg", callbacks=list(callbacks)).fit(module, loaders)
    return module.x.item()


@pytest.mark.parametrize("callbacks", [(), (LooksAtBatches(),)], ids=["tight", "hooked"])
@pytest.mark.parametrize(
    ("loaders", "attributes"),
    [
        (_loaders("own batch sampler"), {}),
        (_loaders("batches as samples"), {}),
        (_loaders("stream"), {"logged_size": 2}),
        (_loaders("stream"), {"logged_size": 2, "on_epoch": False}),
        (_loaders("stream", num_examples={0: 4, 1: 4}), {}),
    ],
    ids=["batch sampler", "batches as samples", "logged", "logged by step", "declared"],
)
def test_nodes_do_not_count_as_examples(loaders: Any, attributes: dict[str, Any], callbacks: Any) -> None:
    assert _share_of_second(loaders, callbacks, **attributes) == pytest.approx(0.5)


def test_graphs_do() -> None:
    """So that a uniform mean does not pass the test above."""
    assert _share_of_second(_loaders("own batch sampler", sizes=(2, 6))) == pytest.approx(0.75)
    assert _share_of_second(_loaders("stream", num_examples=[2, 6].__getitem__, sizes=(2, 6))) == pytest.approx(0.75)


@pytest.mark.parametrize("callbacks", [(), (LooksAtBatches(),)], ids=["tight", "hooked"])
def test_what_cannot_be_told_is_asked_for(callbacks: Any) -> None:
    with pytest.raises(ValueError, match=r"num_examples="):
        _share_of_second(_loaders("stream"), callbacks)


def test_uniform_weights_need_no_number() -> None:
    module = OnGraphs(start=0.0, lr=1.0)
    trainer(fl.FederatedStrategy("fedavg", weighting="uniform")).fit(module, _loaders("stream"))
    assert weights(module).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ({"x": torch.zeros(5, 2), "names": ["a"] * 5, "step": torch.tensor(1.0)}, 5),
        ((torch.zeros(5), [torch.zeros(5, 1)], None), 5),
        ([1.0, 2], 1),
        (torch.tensor(1.0), 1),
        ((torch.zeros(5, 2), torch.zeros(1, 2)), None),
        (["a text", "another"], None),
        (Graph(torch.zeros(1), torch.zeros(7, 3)), None),
    ],
)
def test_a_batch_shows_its_size_by_the_dimension_that_its_tensors_share(batch: Any, size: int | None) -> None:
    assert batch_size(batch) == size
