"""What a user adds to the Trainer."""

from lightning_fl.callbacks.dry_run import DryRun
from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.callbacks.personalized_evaluation import PersonalizedEvaluation

__all__ = ["DryRun", "FederatedCallback", "PersonalizedEvaluation"]
