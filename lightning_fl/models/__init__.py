"""Small reference models, used by the recipes."""

from lightning_fl.models.classifier import Classifier, MLPClassifier
from lightning_fl.models.gan import GAN
from lightning_fl.models.images import FedAvgCNN, LeNet, LogisticRegression, TwoNN
from lightning_fl.models.language import DPO, CausalLM
from lightning_fl.models.libraries import TimmClassifier, TorchvisionClassifier, TransformersClassifier
from lightning_fl.models.resnet import ResNet18GN, ResNet20GN
from lightning_fl.models.search import ArchitectureSearch
from lightning_fl.models.segmentation import SmallUNet
from lightning_fl.models.signals import SignalCNN
from lightning_fl.models.survival import DeepSurv
from lightning_fl.models.tabular import TabularMLP, TabularRegressor
from lightning_fl.models.text import CharLSTM, CharTransformer

__all__ = [
    "DPO",
    "GAN",
    "ArchitectureSearch",
    "CausalLM",
    "CharLSTM",
    "CharTransformer",
    "Classifier",
    "DeepSurv",
    "FedAvgCNN",
    "LeNet",
    "LogisticRegression",
    "MLPClassifier",
    "ResNet18GN",
    "ResNet20GN",
    "SignalCNN",
    "SmallUNet",
    "TabularMLP",
    "TabularRegressor",
    "TimmClassifier",
    "TorchvisionClassifier",
    "TransformersClassifier",
    "TwoNN",
]
