"""lightly: BYOL, whose frozen teacher follows the student in training_step."""

import copy

import lightning as L
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch.utils.data import DataLoader, TensorDataset

DISTRIBUTIONS = ("lightly",)
WHAT = "BYOL"


def backbone():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.ReLU())


class BYOL(L.LightningModule):
    """As in lightly's examples, with a smaller backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = backbone()
        self.projection_head, self.prediction_head = BYOLProjectionHead(16, 8, 8), BYOLPredictionHead(8, 8, 8)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x)))

    def teacher(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x)).detach()

    def training_step(self, batch, batch_idx):
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        first, second = batch
        return 0.5 * (
            self.criterion(self(first), self.teacher(second)) + self.criterion(self(second), self.teacher(first))
        )

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def views(client):
    generator = torch.Generator().manual_seed(client)
    images = torch.randn(8 + 4 * (client % 2), 3, 4, 4, generator=generator)
    first, second = (images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(2))
    return DataLoader(TensorDataset(first, second), batch_size=4)


def make(client):
    torch.manual_seed(0)
    return BYOL(), views(client)
