"""What an update betrays of the data behind it: attacks to try on one's own model before it takes part."""

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
