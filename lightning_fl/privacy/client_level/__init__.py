"""Differential privacy for clients: each update is clipped, their sum is noised."""

from lightning_fl.privacy.client_level.band_mf import BandMF
from lightning_fl.privacy.client_level.clipping import AdaptiveClip
from lightning_fl.privacy.client_level.mechanism import ClientLevelDP, PrivacyBudgetExceeded

__all__ = ["AdaptiveClip", "BandMF", "ClientLevelDP", "PrivacyBudgetExceeded"]
