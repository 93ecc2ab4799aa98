"""Helpers for the data sets of scikit-learn."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np


def check_test_share(test_share: float) -> float:
    """Returns ``test_share``.

    Raises:
        ValueError: If it is out of range.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share} must be between 0 and 1; 0.2 holds out a fifth for testing.")
    return test_share


def load(function: str, datamodule: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a data set of scikit-learn.

    Args:
        function: The function of ``sklearn.datasets`` that loads it.
        datamodule: Name of the datamodule, for the error message.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            f'{datamodule} needs scikit-learn, which is not installed: pip install "lightning-fl[data]"'
        ) from error
    loaded: Any = getattr(datasets, function)(return_X_y=True)
    return loaded


def stratified_split(labels: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and test examples, with the same proportions of labels."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed)
    return train, test
