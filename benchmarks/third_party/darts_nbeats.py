"""darts: NBEATS, with the module and the loader that it hands to its pytorch_lightning Trainer."""

import numpy as np
import pytorch_lightning as pl
import torch
from darts import TimeSeries
from darts.models import NBEATSModel

from benchmarks.third_party.wrapping import shown_to

DISTRIBUTIONS = ("darts",)
WHAT = "NBEATSModel.fit's module and loader"


def make(client):
    torch.manual_seed(0)
    model = NBEATSModel(
        8, 2, num_stacks=1, num_blocks=1, num_layers=1, layer_widths=8, batch_size=4, random_state=0, n_epochs=2
    )
    values = np.random.default_rng(client).normal(size=20 + 4 * (client % 2))
    series = TimeSeries.from_values(values)
    module, data = shown_to(pl.Trainer, lambda trainer: model.fit(series, trainer=trainer))
    data.shuffle = False
    return module, data.train_dataloader()
