"""Adapters of a peft model: put into its layers, or written alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl.callbacks.adapter_checkpoint import peft_model, save_adapters


def merged(module: L.LightningModule) -> L.LightningModule:
    """A copy of a module whose adapters have become part of the layers that they adapt; peft is not needed any more.

    Raises:
        ValueError: If it holds no peft model.
    """
    own = copy.deepcopy(module)
    prefix, model = _found(own)
    parent, _, name = prefix.removesuffix(".").rpartition(".")
    setattr(own.get_submodule(parent), name, model.merge_and_unload())
    return own


def write_adapters(module: L.LightningModule, path: Path) -> None:
    """Writes the adapters alone, as a folder in peft's format.

    Raises:
        ValueError: If the module holds no peft model.
    """
    _found(module)
    save_adapters(module, module.state_dict(), path)


def with_adapters_of(path: Path, module: L.LightningModule) -> L.LightningModule:
    """A copy of a module with the adapters of a folder in the place of its own."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    own = copy.deepcopy(module)
    _, model = peft_model(own)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.zero_()  # what the folder lacks then shows
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    return own


def _found(module: L.LightningModule) -> tuple[str, Any]:
    try:
        return peft_model(module)
    except MisconfigurationException as error:
        raise ValueError(
            f"{type(module).__name__} holds no adapters of peft, which could be written or merged."
        ) from error
