"""Simulated attacks on a federation: ``FederatedStrategy(adversary=fl.attacks.Adversary(...))``."""

from lightning_fl.attacks.adversary import Adversary
from lightning_fl.attacks.attack import Attack, CollusionAttack, DataAttack, HonestUpdates, UpdateAttack
from lightning_fl.attacks.backdoor_success import BackdoorSuccess
from lightning_fl.attacks.collusion import ALIE, IPM, Mimic, MinMax, MinSum
from lightning_fl.attacks.data import Backdoor, LabelFlip, SemanticBackdoor, Trigger
from lightning_fl.attacks.own_update import GaussianNoise, Lazy, Scaling, SignFlip

__all__ = [
    "ALIE",
    "IPM",
    "Adversary",
    "Attack",
    "Backdoor",
    "BackdoorSuccess",
    "CollusionAttack",
    "DataAttack",
    "GaussianNoise",
    "HonestUpdates",
    "LabelFlip",
    "Lazy",
    "Mimic",
    "MinMax",
    "MinSum",
    "Scaling",
    "SemanticBackdoor",
    "SignFlip",
    "Trigger",
    "UpdateAttack",
]
