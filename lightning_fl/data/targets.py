"""Targets and columns of a map-style data set, and the groups that label-based partitioners split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

_LABEL_KEYS = ("targets", "labels", "target", "label", "y")
MAX_RARE_LABELS, MIN_PER_LABEL = 20, 3
"""With more labels than this, each needs this many samples on average; otherwise they are treated as numbers."""
Find = Callable[[Any], np.ndarray | None]


def targets(dataset: Any) -> np.ndarray:
    """The targets of a data set.

    They are taken from the last tensor of a ``TensorDataset``, or from the attribute or column ``targets``, ``labels``,
    ``target``, ``label`` or ``y``, also through ``Subset`` and ``ConcatDataset``. Otherwise every sample is read: the
    target is the last entry of a tuple or list, or the entry or attribute of one of these names.

    Args:
        dataset: A map-style data set.

    Returns:
        Class labels, int64 of shape ``[num_samples]``; regression targets, float64 of shape ``[num_samples]``; or
        multi-label targets, bool of shape ``[num_samples, num_labels]``.

    Raises:
        ValueError: If the samples have no targets, or targets of another kind.
    """
    values = _find_stored(dataset, _stored_targets)
    if values is None:
        values = _as_array([_target_of(dataset[index]) for index in range(len(dataset))])
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 1 and values.dtype.kind in "iub":
        return values.astype(np.int64)
    if values.ndim == 1 and values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(
                f"{(~np.isfinite(values)).sum()} of the {len(values)} targets of {type(dataset).__name__} are NaN or "
                "infinite. Fix these samples or leave them out."
            )
        return values.astype(np.float64)
    if values.ndim == 2 and values.dtype.kind in "iubf" and np.isin(values, (0, 1)).all():
        return values.astype(bool)
    raise ValueError(
        f"The targets of {type(dataset).__name__} are {values.dtype} of shape {list(values.shape)}; a split by label "
        "needs for each sample a class label (an integer), a number, or a row of zeros and ones with one entry per "
        "label. Split data with other targets with IID()."
    )


def stored_labels(dataset: Any) -> np.ndarray | None:
    """The class labels that a data set stores, int64 of shape ``[num_samples]``; None if it stores none."""
    values = _find_stored(dataset, _stored_targets)
    if values is None or values.dtype.kind not in "iub" or values.size != len(values):
        return None
    return values.reshape(-1).astype(np.int64)


def label_groups(dataset: Any, num_bins: int = 10) -> np.ndarray:
    """The group of each sample for a split by label, int64 of shape ``[num_samples]``, numbered from 0 without gaps.

    Each class is a group; integers of which hardly any are equal are refused, because they must be regression targets.
    Regression targets with more than ``num_bins`` different values are binned at their quantiles. A sample with several
    labels belongs to the group of its rarest label; samples without a label form a group.

    Args:
        dataset: A map-style data set.
        num_bins: Number of bins for regression targets, at least 1.

    Raises:
        ValueError: See :func:`targets`; or if integers look like numbers rather than class labels.
    """
    values = targets(dataset)
    are_integers = values.dtype == np.int64
    if values.dtype == np.bool_:
        by_rarity = np.argsort(values.sum(axis=0), kind="stable")
        first = values[:, by_rarity].argmax(axis=1)
        values = np.where(values.any(axis=1), by_rarity[first], -1)
    elif values.dtype == np.float64 and len(np.unique(values)) > num_bins:
        # Quantiles, because bins of equal width would be nearly empty where the targets are skewed.
        edges = np.quantile(values, np.arange(1, num_bins) / num_bins)
        values = np.searchsorted(edges, values, side="right")
    found, groups = np.unique(values, return_inverse=True)
    if are_integers and len(found) > MAX_RARE_LABELS and len(values) < MIN_PER_LABEL * len(found):
        raise ValueError(
            f"The targets of {type(dataset).__name__} are {len(found)} different integers for {len(values)} samples, "
            "so they look like numbers to predict, not like class labels, and each would be a label of its own. Make "
            "them floats, which are split by `num_bins` quantiles, or split the data with IID()."
        )
    return groups.astype(np.int64)


Column = str | int | Sequence[Any] | np.ndarray | Callable[[Any], Any]
"""Identifies one value of each sample; see :func:`column`."""


def column(dataset: Any, name: Column) -> np.ndarray:
    """One column of a data set, of shape ``[num_samples]``.

    Args:
        dataset: A map-style data set.
        name: Name of an attribute with one value per sample, of a Hugging Face column, or of an entry or attribute of
            the samples; the position of an entry of samples that are tuples; a function of a sample; or the values
            themselves, one for each sample.

    Raises:
        ValueError: If the data set has no such column, or it is not one integer or string per sample.
    """
    values: np.ndarray | None
    if callable(name):
        values = _as_array([_as_array(name(dataset[index])).tolist() for index in range(len(dataset))])
    elif isinstance(name, str | int):
        values = _named_column(dataset, name)
    else:
        values = _as_array(name)
    if values.ndim == 1 and len(values) != len(dataset):
        raise ValueError(
            f"The column has {len(values)} values for the {len(dataset)} samples of {type(dataset).__name__}; expected "
            "one per sample."
        )
    if values.ndim != 1 or values.dtype.kind not in "iubUOS":
        shown = column_name(name)
        raise ValueError(
            f"{shown[0].upper()}{shown[1:]} of {type(dataset).__name__} is {values.dtype} of shape "
            f"{list(values.shape)}; expected one integer or string per sample."
        )
    return values


def column_name(name: Column) -> str:
    """The column's name for an error message."""
    return f"column {name!r}" if isinstance(name, str | int) else "the column"


def _named_column(dataset: Any, name: str | int) -> np.ndarray:
    values = _find_stored(dataset, lambda data: _stored_column(data, name))
    if values is None:
        try:
            values = _as_array([_as_array(_entry(dataset[index], name)).tolist() for index in range(len(dataset))])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{type(dataset).__name__} has no column {name!r}: found neither an attribute of that name with one "
                "value per sample nor such an entry in its samples."
            ) from error
    return values


def _entry(sample: Any, name: str | int) -> Any:
    if isinstance(name, str) and not isinstance(sample, Mapping) and hasattr(sample, name):
        return getattr(sample, name)
    return sample[name]


def _find_stored(dataset: Any, find: Find) -> np.ndarray | None:
    """Applies ``find``, which reads no samples, to a data set or to the data sets that it is a view of."""
    if isinstance(dataset, Subset):
        values = _find_stored(dataset.dataset, find)
        return None if values is None else values[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        pieces = [_find_stored(piece, find) for piece in dataset.datasets]
        return None if any(piece is None for piece in pieces) else np.concatenate(pieces)  # type: ignore[arg-type]
    return find(dataset)


def _stored_targets(dataset: Any) -> np.ndarray | None:
    if isinstance(dataset, TensorDataset):
        return _as_array(dataset.tensors[-1])
    for name in _LABEL_KEYS:
        values = _stored_column(dataset, name)
        if values is not None:
            return values
    return None


def _stored_column(dataset: Any, name: str | int) -> np.ndarray | None:
    if isinstance(name, int):
        return _as_array(dataset.tensors[name]) if isinstance(dataset, TensorDataset) else None
    if name in (getattr(dataset, "column_names", None) or ()):
        # As stored: a transform may need the other columns, and a format costs time.
        raw = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
        return _as_array(list(raw[name]))
    return _attribute(dataset, name)


def _attribute(dataset: Any, name: str) -> np.ndarray | None:
    values: Any = getattr(dataset, name, None)
    return _as_array(values) if hasattr(values, "__len__") and len(values) == len(dataset) else None


def _target_of(sample: Any) -> Any:
    if isinstance(sample, tuple | list):
        if len(sample) > 1:
            return _as_array(sample[-1]).tolist()
    else:
        for key in _LABEL_KEYS:
            found = sample.get(key) if isinstance(sample, Mapping) else getattr(sample, key, None)
            if found is not None and (isinstance(sample, Mapping) or isinstance(found, torch.Tensor | np.ndarray)):
                return _one_target(_as_array(found))
    raise ValueError(
        f"A sample of type {type(sample).__name__} has no label: expected a tuple or list that ends with the label, "
        f"or an entry or attribute {', '.join(_LABEL_KEYS)}. Split data without labels with IID()."
    )


def _one_target(target: np.ndarray) -> Any:
    # Graph libraries keep the label of a graph as a tensor of shape [1] or [1, num_labels].
    return (target[0] if target.ndim > 1 and len(target) == 1 else target).tolist()


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16
        return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
    try:
        found = np.asarray(values)
        is_text = found.dtype.kind in "US" and not isinstance(values, np.ndarray | str | bytes)
        # NumPy would make text of numbers that stand beside text; the caller reports dtype object.
        has_others = is_text and found.ndim == 1 and not all(isinstance(own, str | bytes) for own in values)
        return np.asarray(values, dtype=object) if has_others else found
    except ValueError:  # samples of different shapes; the caller reports dtype object
        return np.asarray(values, dtype=object)
