"""Survival of patients with lung cancer at 19 institutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lightning_fl.datamodules.natural import ClientData, NaturalDataModule

SCALES = {"age": (62.0, 9.0), "sex": (1.5, 0.5), "ph.ecog": (1.0, 0.7)}
"""Round numbers by which features are centred and scaled; they reveal nothing about any institution."""


class LungDataModule(NaturalDataModule):
    """The NCCTG lung cancer data, one client per institution: age, sex, ECOG score, and days until death or censoring.

    Samples are pairs of float32 features ``[num_features]``, scaled by round numbers, and float32 ``[2]``: days and
    event (1: died). Rows with a missing value are left out.

    Args:
        path: A CSV file like ``examples/lung.csv``, with the columns inst, time, status and the features. The largest
            value of status means that the patient died (True; 2 of 1 and 2; 1 of 0 and 1).
        features: Some of the columns age, sex and ph.ecog.
        **kwargs: ``batch_size``, ``val_share``, ``test_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        FileNotFoundError: On setup, if there is no file.

    References:
        Loprinzi et al., *Prospective evaluation of prognostic variables from patient-completed questionnaires*, 1994.
    """

    def __init__(
        self,
        path: str | Path = "examples/lung.csv",
        features: tuple[str, ...] = ("age", "sex", "ph.ecog"),
        batch_size: int = 64,
        test_share: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, test_share=test_share, **kwargs)
        unknown = set(features) - set(SCALES)
        if unknown or not features:
            raise ValueError(f"features={features} must be some of {', '.join(SCALES)}.")
        self.path = Path(path)
        self.features = tuple(features)

    def read(self) -> ClientData:
        """Institutions and their patients."""
        import pandas

        table = pandas.read_csv(self.path).dropna(subset=["inst", "time", "status", *self.features])
        centre, scale = np.array([SCALES[name] for name in self.features]).T
        x = ((table[list(self.features)].to_numpy(float) - centre) / scale).astype(np.float32)
        died = table["status"].to_numpy(float) == table["status"].to_numpy(float).max()
        y = np.stack([table["time"].to_numpy(float), died], axis=1).astype(np.float32)
        place = table["inst"].to_numpy(int)
        rows = {int(inst): np.flatnonzero(place == inst) for inst in np.unique(place)}

        def open_client(client: int) -> TensorDataset:
            return TensorDataset(torch.from_numpy(x[rows[client]]), torch.from_numpy(y[rows[client]]))

        return ClientData(list(rows), lambda client: len(rows[client]), open_client)
