"""Differential privacy and secure aggregation."""

from typing import TYPE_CHECKING

from lightning_fl.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fl.privacy.accounting.calibration import noise_multiplier_for
    from lightning_fl.privacy.accounting.ledger import Epsilon, Gaussian, Ledger
    from lightning_fl.privacy.accounting.sampling import FixedSize, Full, LocalSteps, Poisson, Sampling
    from lightning_fl.privacy.client_level.band_mf import BandMF
    from lightning_fl.privacy.client_level.clipping import AdaptiveClip
    from lightning_fl.privacy.client_level.mechanism import ClientLevelDP, PrivacyBudgetExceeded
    from lightning_fl.privacy.noise import InsecureNoiseWarning, PrivacyError, SecureNoise
    from lightning_fl.privacy.scaling import PrivateScaling
    from lightning_fl.privacy.secagg import SecureAggregation
    from lightning_fl.privacy.state import load_ledger

__all__ = [
    "AdaptiveClip",
    "BandMF",
    "ClientLevelDP",
    "Epsilon",
    "FixedSize",
    "Full",
    "Gaussian",
    "InsecureNoiseWarning",
    "Ledger",
    "LocalSteps",
    "Poisson",
    "PrivacyBudgetExceeded",
    "PrivacyError",
    "PrivateScaling",
    "Sampling",
    "SecureAggregation",
    "SecureNoise",
    "load_ledger",
    "noise_multiplier_for",
]

# Reading a key file needs no torch.
__getattr__, __dir__ = lazy_names(__name__)
