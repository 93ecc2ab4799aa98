"""What a user adds to the Trainer."""

from lightning_fl.callbacks.dry_run import DryRun
from lightning_fl.callbacks.federated import FederatedCallback

__all__ = ["DryRun", "FederatedCallback"]
