"""timm: a small ResNet with BatchNorm."""

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.third_party.wrapping import Wrapped

DISTRIBUTIONS = ("timm",)
WHAT = "resnet10t"


def images(client, classes=3, size=32):
    generator = torch.Generator().manual_seed(client)
    count = 6 + 2 * (client % 2)
    return TensorDataset(
        torch.randn(count, 3, size, size, generator=generator), torch.randint(classes, (count,), generator=generator)
    )


def loss(net, batch):
    return torch.nn.functional.cross_entropy(net(batch[0]), batch[1])


def make(client):
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    return Wrapped(net, loss), DataLoader(images(client), batch_size=2)
