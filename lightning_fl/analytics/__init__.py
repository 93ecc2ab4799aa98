"""Federated analytics: statistics of data that stays with its clients."""

from typing import TYPE_CHECKING

from lightning_fl.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fl.analytics.analysis import Analysis, analyze
    from lightning_fl.analytics.counts import ChiSquare, Frequency, Histogram, Quantile
    from lightning_fl.analytics.moments import PCA, Correlation, Count, Mean, Variance
    from lightning_fl.analytics.privacy import RowLevelDP
    from lightning_fl.analytics.question import Answer, Question
    from lightning_fl.analytics.schema import FederatedSchema, federated_schema
    from lightning_fl.analytics.sketches import Cardinality, HeavyHitters, Intersection, trie_parameters
    from lightning_fl.analytics.strata import By, TTest
    from lightning_fl.analytics.survival import Cox, KaplanMeier, LogRank

__all__ = [
    "PCA",
    "Analysis",
    "Answer",
    "By",
    "Cardinality",
    "ChiSquare",
    "Correlation",
    "Count",
    "Cox",
    "FederatedSchema",
    "Frequency",
    "HeavyHitters",
    "Histogram",
    "Intersection",
    "KaplanMeier",
    "LogRank",
    "Mean",
    "Quantile",
    "Question",
    "RowLevelDP",
    "TTest",
    "Variance",
    "analyze",
    "federated_schema",
    "trie_parameters",
]

__getattr__, __dir__ = lazy_names(__name__)
