"""Lightning's own demos: the BoringModel that its tests and examples train."""

import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

DISTRIBUTIONS = ("lightning",)
WHAT = "demos.BoringModel"


def make(client):
    torch.manual_seed(0)
    module = BoringModel()
    torch.manual_seed(client)
    return module, DataLoader(RandomDataset(32, 6 + 2 * (client % 2)), batch_size=2)
