"""Robust aggregation rules: a few attackers can't move the result arbitrarily."""

from lightning_fl.aggregation.robust.bulyan import Bulyan
from lightning_fl.aggregation.robust.centered_clipping import CenteredClipping
from lightning_fl.aggregation.robust.dnc import DnC
from lightning_fl.aggregation.robust.fedmgda import FedMGDA
from lightning_fl.aggregation.robust.flame import FLAME
from lightning_fl.aggregation.robust.fltrust import FLTrust
from lightning_fl.aggregation.robust.foolsgold import FoolsGold
from lightning_fl.aggregation.robust.geometric_median import GeometricMedian
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.krum import Krum, MultiKrum
from lightning_fl.aggregation.robust.mean_around_median import MeanAroundMedian
from lightning_fl.aggregation.robust.median import Median
from lightning_fl.aggregation.robust.mixing import Bucketing, NearestNeighborMixing
from lightning_fl.aggregation.robust.norm_bound import NormBound
from lightning_fl.aggregation.robust.rule import CoordinateRule, GramRule, PreAggregator, RowAggregator
from lightning_fl.aggregation.robust.screened import Check, CosineCheck, NormCheck, Screened
from lightning_fl.aggregation.robust.trimmed_mean import TrimmedMean
from lightning_fl.aggregation.robust.validation_check import ValidationCheck

__all__ = [
    "FLAME",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Check",
    "CoordinateRule",
    "CosineCheck",
    "DnC",
    "FLTrust",
    "FedMGDA",
    "FoolsGold",
    "GeometricMedian",
    "Gram",
    "GramRule",
    "Krum",
    "MeanAroundMedian",
    "Median",
    "MultiKrum",
    "NearestNeighborMixing",
    "NormBound",
    "NormCheck",
    "PreAggregator",
    "RowAggregator",
    "Screened",
    "TrimmedMean",
    "ValidationCheck",
]
