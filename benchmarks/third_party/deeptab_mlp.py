"""deeptab: the module and the datamodule that its MLP classifier hands to a Trainer."""

import numpy as np
import pandas as pd
import torch
from deeptab.models import MLPClassifier
from torch.utils.data import DataLoader

DISTRIBUTIONS = ("deeptab",)
WHAT = "MLPClassifier's module and loader"
DRAWS = True


def make(client):
    rng = np.random.default_rng(client)
    rows = 16 + 4 * (client % 2)
    table, labels = pd.DataFrame(rng.normal(size=(rows, 3)), columns=["a", "b", "c"]), np.arange(rows) % 2
    torch.manual_seed(0)
    model = MLPClassifier()
    model.build_model(table, labels, batch_size=4)
    data = model._data_module
    data.setup("fit")
    return model._task_model, DataLoader(data.train_dataset, batch_size=4)
