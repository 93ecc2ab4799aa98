"""Adapters of a peft model: merged into its layers, or saved separately."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl.callbacks.adapter_checkpoint import peft_model, save_adapters


def merged(module: L.LightningModule) -> L.LightningModule:
    """A copy of a module with its adapters merged into the layers that they adapt, which no longer needs peft.

    Raises:
        ValueError: If the module contains no peft model.
    """
    own = copy.deepcopy(module)
    prefix, model = _found(own)
    parent, _, name = prefix.removesuffix(".").rpartition(".")
    setattr(own.get_submodule(parent), name, model.merge_and_unload())
    return own


def write_adapters(module: L.LightningModule, path: Path) -> None:
    """Writes only the adapters, as a folder in peft's format.

    Raises:
        ValueError: If the module contains no peft model.
    """
    _found(module)
    save_adapters(module, module.state_dict(), path)


def with_adapters_of(path: Path, module: L.LightningModule) -> L.LightningModule:
    """A copy of a module with its adapters replaced by those of a folder."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    own = copy.deepcopy(module)
    _, model = peft_model(own)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.zero_()  # so that tensors missing in the folder change the output
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    return own


def _found(module: L.LightningModule) -> tuple[str, Any]:
    try:
        return peft_model(module)
    except MisconfigurationException as error:
        raise ValueError(f"{type(module).__name__} contains no peft adapters to write or merge.") from error
