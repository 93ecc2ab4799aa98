"""Small reference models that the recipes use."""

from lightning_fl.models.classifier import Classifier, MLPClassifier

__all__ = ["Classifier", "MLPClassifier"]
