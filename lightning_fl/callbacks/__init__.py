"""Callbacks for a Trainer with a federated strategy."""

from lightning_fl.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_fl.callbacks.alerts import Alert, Alerts
from lightning_fl.callbacks.client_metrics import ClientMetrics
from lightning_fl.callbacks.contribution import Contribution
from lightning_fl.callbacks.dry_run import DryRun
from lightning_fl.callbacks.ensemble_distillation import EnsembleDistillation
from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.callbacks.generation_samples import GenerationSamples
from lightning_fl.callbacks.personalized_evaluation import PersonalizedEvaluation
from lightning_fl.callbacks.progress import FederatedProgressBar
from lightning_fl.callbacks.prometheus import Prometheus
from lightning_fl.callbacks.register_model import RegisterModel
from lightning_fl.callbacks.run_record import RunRecord
from lightning_fl.callbacks.sample_level_dp.audit import audit
from lightning_fl.callbacks.sample_level_dp.callback import SampleLevelDP

__all__ = [
    "AdapterCheckpoint",
    "Alert",
    "Alerts",
    "ClientMetrics",
    "Contribution",
    "DryRun",
    "EnsembleDistillation",
    "FederatedCallback",
    "FederatedProgressBar",
    "GenerationSamples",
    "PersonalizedEvaluation",
    "Prometheus",
    "RegisterModel",
    "RunRecord",
    "SampleLevelDP",
    "audit",
]
