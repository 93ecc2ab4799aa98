"""pytorch-tabular: the module and the loader of its TabularModel."""

import numpy as np
import pandas as pd
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

DISTRIBUTIONS = ("pytorch-tabular",)
WHAT = "TabularModel's module and loader"
DRAWS = True


def make(client):
    rng = np.random.default_rng(client)
    rows = 8 + 4 * (client % 2)
    frame = pd.DataFrame(rng.normal(size=(rows, 3)).astype(np.float32), columns=["a", "b", "c"])
    frame["y"] = np.arange(rows) % 2
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=["a", "b", "c"], num_workers=0, pin_memory=False),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="8-4", dropout=0.0),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=4, max_epochs=2, accelerator="cpu", progress_bar="none"),
        verbose=False,
        suppress_lightning_logger=True,
    )
    data = model.prepare_dataloader(train=frame, validation=frame, seed=0)
    torch.manual_seed(0)
    module = model.prepare_model(data)
    # In the order of one reading, because its loader shuffles.
    batches = list(data.train_dataloader())
    return module, torch.utils.data.DataLoader(batches, batch_size=None)
