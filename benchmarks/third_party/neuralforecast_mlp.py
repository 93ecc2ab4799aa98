"""neuralforecast: an MLP, with the module and the datamodule that it hands to its pytorch_lightning Trainer."""

import numpy as np
import pandas as pd
import torch
from neuralforecast.models import MLP
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

DISTRIBUTIONS = ("neuralforecast",)
WHAT = "MLP, TimeSeriesDataset"
DRAWS = True


def make(client):
    torch.manual_seed(0)
    module = MLP(h=2, input_size=6, hidden_size=8, num_layers=1, max_steps=4, batch_size=2, windows_batch_size=4)
    rng = np.random.default_rng(client)
    frames = [
        pd.DataFrame({"unique_id": f"s{name}", "ds": np.arange(20), "y": rng.normal(size=20)})
        for name in range(6 + 2 * (client % 2))
    ]
    dataset, *_ = TimeSeriesDataset.from_df(pd.concat(frames, ignore_index=True))
    given = TimeSeriesDataModule(dataset, batch_size=2, shuffle_train=False)
    return module, given.train_dataloader()
