"""Lightning's own demos: the transformer."""

import torch
from lightning.pytorch.demos import LightningTransformer
from torch.utils.data import DataLoader, TensorDataset

DISTRIBUTIONS = ("lightning",)
WHAT = "demos.LightningTransformer"
DRAWS = True


class Predicting(LightningTransformer):
    """Also predicts."""

    def predict_step(self, batch, batch_idx):
        return self(*batch)


def make(client):
    torch.manual_seed(0)
    module = Predicting(vocab_size=11)
    generator = torch.Generator().manual_seed(client)
    tokens = torch.randint(11, (6 + 2 * client, 2, 5), generator=generator)
    return module, DataLoader(TensorDataset(tokens[:, 0], tokens[:, 1]), batch_size=2)
