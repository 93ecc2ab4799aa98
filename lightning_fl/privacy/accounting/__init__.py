"""Privacy accounting: the ledger of releases, and the resulting epsilon."""

from lightning_fl.privacy.accounting.calibration import noise_multiplier_for
from lightning_fl.privacy.accounting.ledger import Epsilon, Gaussian, Ledger
from lightning_fl.privacy.accounting.sampling import FixedSize, Full, LocalSteps, Poisson, Sampling

__all__ = [
    "Epsilon",
    "FixedSize",
    "Full",
    "Gaussian",
    "Ledger",
    "LocalSteps",
    "Poisson",
    "Sampling",
    "noise_multiplier_for",
]
