"""pykeen: its LightningModule around TransE."""

import torch
from pykeen.contrib.lightning import SLCWALitModule
from pykeen.datasets.nations import Nations

DISTRIBUTIONS = ("pykeen",)
WHAT = "SLCWALitModule, TransE on Nations"
DRAWS = True


def make(client):
    torch.manual_seed(0)
    module = SLCWALitModule(dataset=Nations(), model="TransE", model_kwargs={"embedding_dim": 4}, batch_size=512)
    return module, module.train_dataloader()
