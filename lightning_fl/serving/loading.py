"""Loads a module, and an example of its input, from a run's folder or a checkpoint."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor

from lightning_fl.strategies import frozen_weights
from lightning_fl.strategies.checkpoint import load_client
from lightning_fl.types import Tree
from lightning_fl.yaml_files import read_yaml

Inputs = tuple[Tensor, ...]
"""The arguments of ``module.forward``, for a batch of examples."""


def find_checkpoint(path: str | Path) -> Path:
    """The path of a checkpoint: the file itself, or ``last.ckpt`` (else the newest) in a run's folder.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(path.glob("**/*.ckpt"), key=lambda file: (file.stem.startswith("last"), file.stat().st_mtime))
    if not found:
        raise ValueError(f"{path} is neither a checkpoint nor a folder with one (*.ckpt).")
    return found[-1]


def load_module(
    checkpoint: str | Path,
    class_path: str | None = None,
    client: int | str | None = None,
    base: str | Path | None = None,
) -> L.LightningModule:
    """The module of a checkpoint, on the CPU and in evaluation mode.

    Only classes that are already imported, this package's own, ``class_path``, and the class named by the run's
    ``config.yaml`` are instantiated: a checkpoint alone can't choose the code that runs.

    Args:
        checkpoint: The file.
        class_path: The module's class, as ``package.Class``. None: the one that the checkpoint names.
        client: The client whose personal tensors are loaded. None: the global model.
        base: A checkpoint or ``state_dict`` (``.ckpt``, ``.pt``, ``.safetensors``) with the frozen parameters, if the
            checkpoint was written without them. None: the module's own, as its ``__init__`` creates them.

    Raises:
        ValueError: If the class is unknown or can't be instantiated from the checkpoint, the checkpoint holds no state
            of the client, or the frozen parameters differ from those that the model was trained with.
    """
    checkpoint = Path(checkpoint)
    content = read(checkpoint)
    hyper_parameters = content.get("hyper_parameters", {})
    config = run_config(checkpoint)
    saved = hyper_parameters.get("_class_path")
    configured = (config.get("model") or {}).get("class_path")
    chosen = class_path or saved or configured
    if chosen is None:
        raise ValueError(f"{checkpoint} does not name the class of its module. Give --module package.Class.")
    if class_path is None and chosen != configured and chosen.partition(".")[0] != "lightning_fl":
        raise ValueError(
            f"{checkpoint} names the class {chosen}, which the run's config.yaml does not confirm. If you trust the "
            f"checkpoint, give --module {chosen}."
        )
    module_class = import_class(chosen)
    frozen = frozen_names(content)
    if base is not None and not frozen:
        raise ValueError(f"{checkpoint} holds all parameters, so --base would be ignored. Leave it out.")
    if saved is None and not hyper_parameters and configured == chosen:
        # The module did not call `save_hyperparameters`; the configuration has its arguments.
        module = instantiate(config, "model", L.LightningModule)
        module.load_state_dict(content["state_dict"], strict=not frozen)
    else:
        try:
            with warnings.catch_warnings():
                # The missing keys are the frozen parameters, which are checked below.
                warnings.filterwarnings("ignore", message="Found keys that are in the model state dict")
                module = module_class.load_from_checkpoint(
                    checkpoint, map_location="cpu", weights_only=True, strict=not frozen
                )
        except TypeError as error:
            raise ValueError(
                f"{module_class.__name__} can't be instantiated from {checkpoint}: {error}. Call "
                "self.save_hyperparameters() in its __init__ before training."
            ) from error
    if base is not None:
        held = _tensors_of(Path(base))
        module.load_state_dict({name: held[name] for name in frozen if name in held}, strict=False)
    if frozen:
        whole_state(content, module, checkpoint)
    if client is not None:
        module.load_state_dict(client_state(checkpoint, client), strict=not frozen)
    return module.eval()


def frozen_names(content: Mapping[str, Any]) -> list[str]:
    """The names of the frozen parameters that a checkpoint was written without."""
    return list(content.get(frozen_weights.KEY) or {})


def whole_state(content: Mapping[str, Any], module: L.LightningModule, checkpoint: Path) -> Tree:
    """The checkpoint's ``state_dict``, with the module's own frozen parameters if it was written without them.

    Raises:
        ValueError: If these differ from the ones that the model was trained with.
    """
    try:
        return dict(frozen_weights.put_in(content, module.state_dict)["state_dict"])
    except MisconfigurationException as error:
        raise ValueError(f"{checkpoint}: {error} Give the file that holds them with --base.") from error


def _tensors_of(path: Path) -> Tree:
    """The tensors of a checkpoint, of a ``state_dict`` or of a safetensors file.

    Raises:
        ValueError: If it is none of them.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} holds no tensors that can be loaded safely: {error}") from error
    return found.get("state_dict", found) if isinstance(found, dict) else {}


def client_state(checkpoint: Path, client: int | str) -> Tree:
    """A client's ``state_dict``, as :func:`~lightning_fl.load_client`.

    Args:
        checkpoint: The file.
        client: The client's id. A string, from a command or a header, may also be the number of a simulated client.

    Raises:
        ValueError: If the checkpoint holds no state of the client.
    """
    try:
        return load_client(checkpoint, client)
    except ValueError:
        if not (isinstance(client, str) and client.isdecimal()):
            raise
    return load_client(checkpoint, int(client))


def read(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's content, loaded with ``weights_only``.

    Raises:
        ValueError: If the file is not a checkpoint, is corrupt, or contains code.
    """
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        found["state_dict"]
    # The unpickler may raise any exception; its message has the reason.
    except Exception as error:
        raise ValueError(f"{checkpoint} is not a checkpoint that can be loaded safely: {error}") from error
    return found


def run_config(checkpoint: Path) -> dict[str, Any]:
    """``config.yaml`` of the run that wrote a checkpoint; empty if there is none."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.yaml").is_file():
            return read_yaml(folder / "config.yaml") or {}
    return {}


def import_class(path: str) -> type[L.LightningModule]:
    """The LightningModule of a path ``package.Class``.

    Raises:
        ValueError: If there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"There is no class {path}: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, L.LightningModule)):
        raise ValueError(f"{path} is not a LightningModule.")
    return found


def example_inputs(module: L.LightningModule, checkpoint: str | Path, shape: tuple[int, ...] | None = None) -> Inputs:
    """Inputs of the module's ``forward`` for two examples.

    Args:
        module: The module; its ``example_input_array`` is used if it has one.
        checkpoint: A checkpoint of its run; otherwise the first validation batch of the data in the run's
            ``config.yaml`` is used.
        shape: Shape of one example, for a ``forward`` that takes one float tensor; takes precedence over the others.

    Raises:
        ValueError: If none of the three is available.
    """
    if shape is not None:
        return (torch.rand(2, *shape),)
    given = module.example_input_array
    if given is None:
        config = run_config(Path(checkpoint))
        if not config.get("data"):
            raise ValueError(
                "An example of the module's input is needed. Give --shape, such as --shape 3,32,32 for one image, set "
                "module.example_input_array, or keep the checkpoint in its run's folder, whose config.yaml names the "
                "data."
            )
        given = _first_batch(config, module)
    if isinstance(given, Tensor):
        given = (given,)
    if not (isinstance(given, tuple | list) and all(isinstance(one, Tensor) and one.ndim for one in given)):
        raise ValueError("The module's input has to be one tensor or a tuple of tensors with a batch dimension.")
    return tuple(torch.cat([one, one])[:2].clone() for one in given)


def _first_batch(config: Mapping[str, Any], module: L.LightningModule) -> Any:
    data = instantiate(config, "data", L.LightningDataModule)
    data.prepare_data()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    if isinstance(batch, Mapping):  # as for a language model, whose forward takes keyword arguments
        return tuple(batch[name] for name in inspect.signature(module.forward).parameters if name in batch)
    return batch[0] if isinstance(batch, tuple | list) else batch


def instantiate(config: Mapping[str, Any], key: str, base: type) -> Any:
    """Instantiates an object of a run's configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, key)
    return parser.instantiate_classes(parser.parse_object({key: config[key]}))[key]
