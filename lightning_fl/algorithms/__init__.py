"""Federated algorithms as pure functions over state; one algorithm per file."""

from lightning_fl.algorithms.adaptive import FedAdagrad, FedAdam, FedYogi
from lightning_fl.algorithms.afl import AFL
from lightning_fl.algorithms.apfl import APFL
from lightning_fl.algorithms.base import Algorithm, ProbeKind, Weighting
from lightning_fl.algorithms.cfl import CFL
from lightning_fl.algorithms.d2 import D2
from lightning_fl.algorithms.decentralized import Decentralized
from lightning_fl.algorithms.diloco import DiLoCo
from lightning_fl.algorithms.ditto import Ditto
from lightning_fl.algorithms.dsgd import DSGD
from lightning_fl.algorithms.fedamp import FedAMP
from lightning_fl.algorithms.fedavg import FedAvg
from lightning_fl.algorithms.fedavgm import FedAvgM
from lightning_fl.algorithms.feddyn import FedDyn
from lightning_fl.algorithms.fedexp import FedExP
from lightning_fl.algorithms.fednova import FedNova
from lightning_fl.algorithms.fedopt import FedOpt
from lightning_fl.algorithms.fedper import FedBN, FedPer, LGFedAvg
from lightning_fl.algorithms.fedprox import FedProx
from lightning_fl.algorithms.fedrep import FedRep
from lightning_fl.algorithms.fedsam import FedSAM
from lightning_fl.algorithms.fedsgd import FedSGD
from lightning_fl.algorithms.gradienttracking import GradientTracking
from lightning_fl.algorithms.ifca import IFCA
from lightning_fl.algorithms.lora import FedSBLoRA, FFALoRA, HetLoRA, square_adapters
from lightning_fl.algorithms.mimelite import MimeLite
from lightning_fl.algorithms.perfedavg import PerFedAvg
from lightning_fl.algorithms.pfedme import PFedMe
from lightning_fl.algorithms.pushsum import PushSum
from lightning_fl.algorithms.qfedavg import QFedAvg
from lightning_fl.algorithms.registry import get_algorithm, load_entry_points, register, registered
from lightning_fl.algorithms.replicas import Replicas
from lightning_fl.algorithms.scaffold import Scaffold
from lightning_fl.algorithms.streaming_diloco import StreamingDiLoCo
from lightning_fl.algorithms.term import TERM

__all__ = [
    "AFL",
    "APFL",
    "CFL",
    "D2",
    "DSGD",
    "IFCA",
    "TERM",
    "Algorithm",
    "Decentralized",
    "DiLoCo",
    "Ditto",
    "FFALoRA",
    "FedAMP",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedDyn",
    "FedExP",
    "FedNova",
    "FedOpt",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedSAM",
    "FedSBLoRA",
    "FedSGD",
    "FedYogi",
    "GradientTracking",
    "HetLoRA",
    "LGFedAvg",
    "MimeLite",
    "PFedMe",
    "PerFedAvg",
    "ProbeKind",
    "PushSum",
    "QFedAvg",
    "Replicas",
    "Scaffold",
    "StreamingDiLoCo",
    "Weighting",
    "get_algorithm",
    "load_entry_points",
    "register",
    "registered",
    "square_adapters",
]
