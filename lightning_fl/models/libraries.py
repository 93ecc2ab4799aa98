"""Classifiers from torchvision, timm and transformers, unchanged or without BatchNorm."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_fl.models.classifier import Classifier


class TorchvisionClassifier(Classifier):
    """Any torchvision classifier, by its name.

    Args:
        name: Name of the model, such as ``"resnet18"``.
        num_classes: Number of classes, at least 2.
        weights: Pretrained weights by torchvision's name, which it downloads; None: random ones.
        group_norm: Whether to replace every ``BatchNorm2d`` by ``GroupNorm``; see ``ResNet20GN`` for why.
        lr: Learning rate.
        momentum: Momentum of SGD.

    Raises:
        ImportError: If torchvision is not installed.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 10,
        weights: str | None = None,
        group_norm: bool = False,
        lr: float = 0.01,
        momentum: float = 0.9,
    ) -> None:
        net = library("torchvision.models").get_model(name, weights=weights, **_head(num_classes, weights))
        if weights is not None:
            _replace_head(net, num_classes)
        super().__init__(replace_batch_norm(net) if group_norm else net, num_classes, lr, momentum)


class TimmClassifier(Classifier):
    """Any timm image classifier, by its name.

    Args:
        name: Name of the model, such as ``"resnet18"``.
        num_classes: Number of classes, at least 2.
        pretrained: Whether to use pretrained weights, which timm downloads.
        group_norm: Whether to replace every ``BatchNorm2d`` by ``GroupNorm``; see ``ResNet20GN`` for why.
        lr: Learning rate.
        momentum: Momentum of SGD.

    Raises:
        ImportError: If timm is not installed.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 10,
        pretrained: bool = False,
        group_norm: bool = False,
        lr: float = 0.01,
        momentum: float = 0.9,
    ) -> None:
        net = library("timm").create_model(name, pretrained=pretrained, num_classes=num_classes)
        super().__init__(replace_batch_norm(net) if group_norm else net, num_classes, lr, momentum)


class TransformersClassifier(Classifier):
    """Any sequence classifier of transformers, from a folder or by its name on the hub.

    Batches are mappings of the tokenizer's output (``input_ids``, ``attention_mask``) and ``labels``, int64 of shape
    ``[batch]``.

    Args:
        name: Folder or name of the model.
        num_classes: Number of classes, at least 2.
        pretrained: Whether to load its weights, except those of a head for another number of classes. False: only its
            configuration, with random weights.
        local_files_only: Whether to use only files on disk and download nothing.
        lr: Learning rate.
        momentum: Momentum of SGD.

    Raises:
        ImportError: If transformers is not installed.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 2,
        pretrained: bool = True,
        local_files_only: bool = True,
        lr: float = 0.01,
        momentum: float = 0.0,
    ) -> None:
        transformers = library("transformers")
        options = {"num_labels": num_classes, "local_files_only": local_files_only}
        auto = transformers.AutoModelForSequenceClassification
        if pretrained:
            net = auto.from_pretrained(name, ignore_mismatched_sizes=True, **options)
        else:
            net = auto.from_config(transformers.AutoConfig.from_pretrained(name, **options))
        super().__init__(net, num_classes, lr, momentum)

    def unpack(self, batch: Any) -> tuple[Any, Tensor]:
        """The tokens and the classes."""
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]

    def forward(self, x: Any) -> Tensor:
        """Class scores of shape ``[batch, num_classes]``."""
        return self.net(**x).logits

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The most likely classes, int64 of shape ``[batch]``."""
        return self({name: value for name, value in batch.items() if name != "labels"}).argmax(dim=1)


def replace_batch_norm(net: nn.Module, num_groups: int = 2) -> nn.Module:
    """Replaces every ``BatchNorm2d`` of the network by ``GroupNorm``, in place.

    Args:
        net: Any network.
        num_groups: Number of channel groups; a layer whose channels it does not divide gets 1.

    Returns:
        The same network.
    """
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = num_groups if child.num_features % num_groups == 0 else 1
            setattr(net, name, nn.GroupNorm(groups, child.num_features, child.eps))
        else:
            replace_batch_norm(child, num_groups)
    return net


def library(name: str) -> Any:
    """Imports a library that is an optional extra.

    Raises:
        ImportError: If it can't be imported; the message says what to install.
    """
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"This model needs {package}, which can't be imported ({error}): pip install {package}"
        ) from error


def _head(num_classes: int, weights: str | None) -> dict[str, int]:
    # Pretrained weights only fit their own number of classes, so the head is replaced after they are loaded.
    return {"num_classes": num_classes} if weights is None else {}


def _replace_head(net: nn.Module, num_classes: int) -> None:
    """Replaces the last linear layer of a pretrained network by a new one with ``num_classes`` outputs."""
    name, last = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Linear(last.in_features, num_classes))
