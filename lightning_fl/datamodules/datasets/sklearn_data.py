"""What the data sets of scikit-learn have in common."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np


def check_test_share(test_share: float) -> float:
    """The share itself.

    Raises:
        ValueError: If it is out of range.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share} must lie between 0 and 1; 0.2 keeps a fifth for testing.")
    return test_share


def load(function: str, user: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a data set that comes with scikit-learn.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            f'{user} needs scikit-learn, which is not installed: pip install "lightning-fl[data]"'
        ) from error
    loaded: Any = getattr(datasets, function)(return_X_y=True)
    return loaded


def stratified_split(labels: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and test examples, with the same shares of labels."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed)
    return train, test
