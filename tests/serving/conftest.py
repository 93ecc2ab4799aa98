from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fl.datamodules import DigitsDataModule
from lightning_fl.models import MLPClassifier
from lightning_fl.strategies import FederatedStrategy


def train(folder: Path, rounds: int = 2, **settings: object) -> Path:
    """Trains on digits with three clients, whose last layer is their own; returns the last checkpoint."""
    trainer = L.Trainer(
        strategy=FederatedStrategy("fedavg", num_clients=3, personal=("net.3.*",)),
        max_epochs=rounds,
        callbacks=[ModelCheckpoint(folder / "checkpoints", save_last=True)],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=2,
        limit_val_batches=0,
    )
    trainer.fit(MLPClassifier(hidden=[16]), DigitsDataModule())
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"))
