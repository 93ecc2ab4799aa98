"""Client-level differential privacy: each update is clipped, and noise is added to the sum."""

from lightning_fl.privacy.client_level.band_mf import BandMF
from lightning_fl.privacy.client_level.clipping import AdaptiveClip
from lightning_fl.privacy.client_level.mechanism import ClientLevelDP, PrivacyBudgetExceeded

__all__ = ["AdaptiveClip", "BandMF", "ClientLevelDP", "PrivacyBudgetExceeded"]
