"""pykeen: its LightningModule around TransE, over some of the batches that its loader draws."""

from itertools import islice

import torch
from pykeen.contrib.lightning import SLCWALitModule
from pykeen.datasets.nations import Nations
from torch.utils.data import DataLoader

DISTRIBUTIONS = ("pykeen",)
WHAT = "SLCWALitModule, TransE on Nations"
DRAWS = True


class Predicting(SLCWALitModule):
    """Also predicts."""

    def predict_step(self, batch, batch_idx):
        return self.model.score_hrt(batch["positives"])


def make(client):
    torch.manual_seed(0)
    module = Predicting(dataset=Nations(), model="TransE", model_kwargs={"embedding_dim": 4}, batch_size=4)
    # Drawn once, because the loader draws other negatives each time it is read.
    torch.manual_seed(client)
    batches = list(islice(module.train_dataloader(), 2 + client % 2))
    return module, DataLoader(batches, batch_size=None)
