"""scvi-tools: the training plan of SCVI and its AnnDataLoader, whose sampler yields whole batches."""

import anndata
import numpy as np
import scvi
import torch
from scvi.dataloaders import AnnDataLoader
from scvi.train import TrainingPlan

DISTRIBUTIONS = ("scvi-tools",)
WHAT = "SCVI's TrainingPlan, AnnDataLoader"
DRAWS = True


class Predicting(TrainingPlan):
    """Also predicts."""

    def predict_step(self, batch, batch_idx):
        return self.module.inference(**self.module._get_inference_input(batch))["qz"].loc


def make(client):
    counts = np.random.default_rng(client).poisson(3.0, (12 + 4 * (client % 2), 10)).astype(np.float32)
    cells = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(cells)
    torch.manual_seed(0)
    model = scvi.model.SCVI(cells, n_hidden=8, n_latent=2, dropout_rate=0.0)
    return Predicting(model.module), AnnDataLoader(model.adata_manager, batch_size=4)
