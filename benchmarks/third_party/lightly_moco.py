"""lightly: MoCo, with a memory bank of past keys in its loss."""

import copy

import lightning as L
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum

from benchmarks.third_party.lightly_byol import backbone, views

DISTRIBUTIONS = ("lightly",)
WHAT = "MoCo with a memory bank"
DRAWS = True


class MoCo(L.LightningModule):
    """As in lightly's examples, with a smaller backbone."""

    def __init__(self):
        super().__init__()
        self.backbone, self.projection_head = backbone(), MoCoProjectionHead(16, 8, 8)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=(16, 8))

    def forward(self, x):
        return self.projection_head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        with torch.no_grad():
            key = self.projection_head_momentum(self.backbone_momentum(batch[1]))
        return self.criterion(self(batch[0]), key)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def make(client):
    torch.manual_seed(0)
    return MoCo(), views(client)
