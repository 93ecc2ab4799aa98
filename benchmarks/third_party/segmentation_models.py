"""segmentation-models-pytorch: a U-Net with its Dice loss."""

import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.third_party.wrapping import Wrapped

DISTRIBUTIONS = ("segmentation-models-pytorch",)
WHAT = "Unet with DiceLoss"
DICE = smp.losses.DiceLoss("binary")


def loss(net, batch):
    return DICE(net(batch[0]), batch[1])


def make(client):
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(16, 8, 8, 4, 4))
    generator = torch.Generator().manual_seed(client)
    images = torch.randn(4 + 2 * (client % 2), 3, 32, 32, generator=generator)
    return Wrapped(net, loss), DataLoader(TensorDataset(images, (images[:, :1] > 0).float()), batch_size=2)
