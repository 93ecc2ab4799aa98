"""pytorch-forecasting: a temporal fusion transformer over its TimeSeriesDataSet."""

import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss

DISTRIBUTIONS = ("pytorch-forecasting",)
WHAT = "TemporalFusionTransformer, TimeSeriesDataSet"
PRECISIONS = ("32-true",)


def make(client):
    rng = np.random.default_rng(client)
    length = 14 + 4 * (client % 2)
    frame = pd.DataFrame({"t": np.arange(length), "y": rng.normal(size=length), "id": "a"})
    data = TimeSeriesDataSet(
        frame,
        time_idx="t",
        target="y",
        group_ids=["id"],
        max_encoder_length=4,
        max_prediction_length=2,
        time_varying_unknown_reals=["y"],
        target_normalizer=None,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "hidden_continuous_size": 4, "attention_head_size": 1, "dropout": 0.0}
    module = TemporalFusionTransformer.from_dataset(
        data, loss=QuantileLoss(), log_interval=-1, reduce_on_plateau_patience=1000, optimizer="adam", **sizes
    )
    return module, data.to_dataloader(train=True, batch_size=4, shuffle=False)
