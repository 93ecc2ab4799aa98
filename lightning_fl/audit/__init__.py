"""Privacy audits: attacks that measure how much an update reveals about its data, to try on your own model."""

from lightning_fl.audit.gradient_inversion import (
    gradients_of,
    gradients_of_update,
    invert_gradients,
    invert_linear,
    label_of,
    psnr,
)
from lightning_fl.audit.membership import losses_of, membership_auc

__all__ = [
    "gradients_of",
    "gradients_of_update",
    "invert_gradients",
    "invert_linear",
    "label_of",
    "losses_of",
    "membership_auc",
    "psnr",
]
