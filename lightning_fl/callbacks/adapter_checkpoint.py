"""Saves adapters in peft's format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_fl.callbacks.round_end import RoundEndCallback
from lightning_fl.callbacks.run_record import run_folder


class AdapterCheckpoint(RoundEndCallback):
    """Writes the adapters of the global model as a folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    The folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, without the base model, and gets its
    name only when it is complete. It is written after the last round, and every ``every_n_rounds`` rounds. Personal
    adapters are written with their common start values.

    Args:
        folder: The folder to write. None: ``adapter`` in the folder of the first logger.
        every_n_rounds: Also write after every ``every_n_rounds`` rounds. None: only at the end.

    Raises:
        ValueError: If ``every_n_rounds`` is not positive.
        MisconfigurationException: When training starts, if the module contains no peft model, or if there is no folder.

    Example:
        >>> import lightning as L
        >>> callbacks = [AdapterCheckpoint("runs/adapter")]
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path | None = None, every_n_rounds: int | None = None) -> None:
        if every_n_rounds is not None and every_n_rounds < 1:
            raise ValueError(f"every_n_rounds={every_n_rounds} must be None or a whole number of at least 1.")
        self.folder = None if folder is None else Path(folder)
        self.every_n_rounds = every_n_rounds
        self._path: Path | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the folder."""
        super().on_train_start(trainer, pl_module)
        peft_model(pl_module)
        own = run_folder(trainer, self.folder)
        self._path = own if own is None or self.folder is not None else own / "adapter"

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Writes the adapters every ``every_n_rounds`` rounds."""
        if self.every_n_rounds is not None and (trainer.current_epoch + 1) % self.every_n_rounds == 0:
            self._write(trainer, module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the adapters of the last round."""
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._path is None:
            return
        # On all ranks: if parameters are sharded over processes, each has a part.
        state = trainer.strategy.lightning_module_state_dict()
        if not trainer.is_global_zero:
            return
        unfinished = self._path.with_name(f".{self._path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        save_adapters(module, state, unfinished)
        old = self._path.with_name(f".{self._path.name}.old")
        if self._path.exists():
            self._path.replace(old)
        unfinished.replace(self._path)
        shutil.rmtree(old, ignore_errors=True)


def save_adapters(module: nn.Module, state: dict[str, Any], folder: Path) -> None:
    """Writes the adapters of a module's peft model in peft's format.

    Args:
        module: The module.
        state: Its ``state_dict``.
        folder: The folder to write.
    """
    prefix, model = peft_model(module)
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    model.save_pretrained(str(folder), state_dict=_without_parametrizations(model, own))
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty template


def peft_model(module: nn.Module) -> tuple[str, Any]:
    """The peft model in a module, and the prefix of its names there.

    Raises:
        MisconfigurationException: If there is none.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MisconfigurationException("Adapters in peft's format need peft: pip install peft") from error
    for name, part in module.named_modules():
        if isinstance(part, PeftModel):
            return f"{name}." if name else "", part
    raise MisconfigurationException(
        f"AdapterCheckpoint writes the adapters of a peft model, but {type(module).__name__} contains none. Create one "
        "with peft.get_peft_model, as fl.models.CausalLM(lora={...}) does."
    )


def _without_parametrizations(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state with the values of parametrized tensors under their plain names, as those of Fed-SB's ``B R``."""
    found = {name: value for name, value in state.items() if "parametrizations." not in name}
    for name, part in model.named_modules():
        for key in getattr(part, "parametrizations", ()):
            found[f"{name}.{key}"] = getattr(part, key).detach()
    return found
