"""chemprop: message passing over molecules, from its own loader with its own sampler."""

import numpy as np
import torch
from chemprop import data, models, nn

DISTRIBUTIONS = ("chemprop",)
WHAT = "MPNN, build_dataloader"
PRECISIONS = ("32-true",)
SMILES = ("C", "CC", "CCO", "CCN", "C1CC1", "CC=O", "CCCl", "c1ccccc1")


def make(client):
    torch.manual_seed(0)
    module = models.MPNN(nn.BondMessagePassing(d_h=8, depth=2), nn.MeanAggregation(), nn.RegressionFFN(input_dim=8))
    values = np.random.default_rng(client).normal(size=(6 + 2 * (client % 2), 1))
    points = [data.MoleculeDatapoint.from_smi(smi, y) for smi, y in zip(SMILES, values, strict=False)]
    return module, data.build_dataloader(data.MoleculeDataset(points), batch_size=2, shuffle=False)
