"""PyTorch Geometric: graphs of different sizes, from its own DataLoader."""

import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool

from benchmarks.third_party.wrapping import Wrapped

DISTRIBUTIONS = ("torch-geometric",)
WHAT = "GCNConv, graphs in its DataLoader"


class Graphs(torch.nn.Module):
    """Two convolutions, then the mean over each graph's nodes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = GCNConv(4, 8), GCNConv(8, 2)

    def forward(self, graphs):
        hidden = self.first(graphs.x, graphs.edge_index).relu()
        return global_mean_pool(self.second(hidden, graphs.edge_index), graphs.batch)


def loss(net, graphs):
    return torch.nn.functional.cross_entropy(net(graphs), graphs.y)


def make(client):
    torch.manual_seed(0)
    net, generator = Graphs(), torch.Generator().manual_seed(client)
    graphs = []
    for number in range(6 + 2 * (client % 2)):
        nodes = 3 + number
        edges = torch.randint(nodes, (2, 2 * nodes), generator=generator)
        # Its batches are no containers that Lightning would convert to double precision.
        x = torch.randn(nodes, 4, generator=generator, dtype=torch.float64)
        graphs.append(Data(x=x, edge_index=edges, y=torch.randint(2, (1,), generator=generator)))
    return Wrapped(net, loss), DataLoader(graphs, batch_size=2)
