"""Small reference models that the recipes use."""

from lightning_fl.models.classifier import Classifier, MLPClassifier
from lightning_fl.models.images import FedAvgCNN, LeNet, LogisticRegression, TwoNN

__all__ = ["Classifier", "FedAvgCNN", "LeNet", "LogisticRegression", "MLPClassifier", "TwoNN"]
