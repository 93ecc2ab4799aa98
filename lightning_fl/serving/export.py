"""Exports a module to formats that run without Lightning, and checks each file by running it."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_fl.serving import adapters
from lightning_fl.serving.loading import Inputs

TOLERANCE = 1e-4
"""Largest difference of a file's outputs from the module's, relative to the largest output."""

Outputs = tuple[Tensor, ...]
Runner = Callable[[Inputs], Outputs]
"""Runs an exported file."""


class Forward(nn.Module):
    """A module's ``forward`` with its outputs as a flat tuple, without the rest of a LightningModule.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Outputs:
        """The outputs as a tuple of tensors."""
        return as_tuple(self.module.forward(*inputs))


def as_tuple(outputs: Any) -> Outputs:
    """Outputs of a forward pass as a tuple.

    Raises:
        ValueError: If they are not tensors.
    """
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not (isinstance(found, tuple | list) and all(isinstance(one, Tensor) for one in found)):
        raise ValueError(
            f"forward returns {type(outputs).__name__}, but only tensors, or a tuple of them, can be exported and "
            "served."
        )
    return tuple(found)


def run(module: nn.Module, inputs: Inputs) -> Outputs:
    """The module's outputs without gradients."""
    with torch.inference_mode():
        return Forward(module)(*inputs)


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    Args:
        suffix: Ending of the file; empty for a folder.
        write: Writes a module to a path, given an example of its inputs.
        load: Returns a function that runs the file, given the module.
        needs: The packages to install.
    """

    suffix: str
    write: Callable[[L.LightningModule, Path, Inputs], None]
    load: Callable[[Path, L.LightningModule], Runner]
    needs: str = ""


def export(
    module: L.LightningModule,
    path: str | Path,
    to: str,
    inputs: Inputs,
    write_beside: Callable[[Path], None] | None = None,
    merge_adapters: bool = False,
) -> float:
    """Exports a module and compares the file's outputs with the module's, for one, two and three examples.

    Args:
        module: The module; it is not changed.
        path: The file; a folder for ``hub`` and ``adapter``.
        to: One of :data:`FORMATS`.
        inputs: Inputs of ``forward`` for two examples.
        write_beside: Writes further files into a folder of ``hub``. Default None.
        merge_adapters: Whether to merge peft adapters into the layers that they adapt. Default False.

    Returns:
        The largest difference of the outputs, relative to the largest output.

    Raises:
        ValueError: If the module can't be exported, or the file's outputs differ; then nothing is left behind.
        ImportError: If the format's package is missing.
    """
    if to not in FORMATS:
        raise ValueError(f"Unknown format {to!r}; expected one of {', '.join(FORMATS)}.")
    path, chosen = Path(path), FORMATS[to]
    whole = copy.deepcopy(module).cpu().eval()
    own = adapters.merged(whole) if merge_adapters else whole
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        unfinished = Path(folder, f"model{chosen.suffix}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the exporters' own code
                chosen.write(own, unfinished, inputs)
                difference = _difference(chosen.load(unfinished, own), whole, inputs)
        except ImportError as error:
            raise ImportError(f"Export to {to} needs more packages: {chosen.needs}. ({error})") from error
        # An exporter may raise any exception for a model that it does not support.
        except Exception as error:
            raise ValueError(f"{type(module).__name__} can't be exported to {to}: {error}") from error
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The outputs of the {to} file differ from those of {type(module).__name__} by {difference:.2g} of the "
                f"largest output, more than {TOLERANCE:g}. Nothing was written. Make sure that forward draws no "
                "random numbers."
            )
        if write_beside is not None:
            write_beside(unfinished)
        if path.is_dir() and not chosen.suffix:
            shutil.rmtree(path)
        unfinished.replace(path)
    return difference


def _difference(runner: Runner, module: L.LightningModule, inputs: Inputs) -> float:
    largest = 0.0
    for size in (1, 2, 3):
        batch = tuple(torch.cat([one, one])[:size] for one in inputs)
        for found, expected in zip(runner(batch), run(module, batch), strict=True):
            if found.shape != expected.shape:
                raise ValueError(f"its output has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
            found, expected = found.double(), expected.double()
            is_finite = expected.isfinite()
            if not torch.allclose(found[~is_finite], expected[~is_finite], equal_nan=True):
                return float("inf")
            found, expected = found[is_finite], expected[is_finite]
            if len(expected):
                error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
                largest = max(largest, error if error == error else float("inf"))
    return largest


# ---- the formats


def _write_safetensors(module: L.LightningModule, path: Path, inputs: Inputs) -> None:
    from safetensors.torch import save_file

    # Tied tensors are written twice, because the format does not support shared memory.
    save_file({name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}, path)


def _load_safetensors(path: Path, module: L.LightningModule) -> Runner:
    from safetensors.torch import load_file

    loaded = copy.deepcopy(module)
    loaded.load_state_dict(load_file(path))
    return lambda inputs: run(loaded, inputs)


def _program(module: L.LightningModule, inputs: Inputs) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(Forward(module), inputs, dynamic_shapes=[tuple({0: batch} for _ in inputs)])


def _write_torch(module: L.LightningModule, path: Path, inputs: Inputs) -> None:
    torch.export.save(_program(module, inputs), path)


def _load_torch(path: Path, module: L.LightningModule) -> Runner:
    program = torch.export.load(path).module()
    return lambda inputs: program(*inputs)


def _write_onnx(module: L.LightningModule, path: Path, inputs: Inputs) -> None:
    program = torch.onnx.export(_program(module, inputs), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)


def _load_onnx(path: Path, module: L.LightningModule) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda inputs: tuple(
        torch.from_numpy(found)
        for found in session.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})
    )


def _write_executorch(module: L.LightningModule, path: Path, inputs: Inputs) -> None:
    from executorch.exir import to_edge

    batch = torch.export.Dim("batch", max=1024)  # the format plans its memory for the largest batch
    program = torch.export.export(Forward(module), inputs, dynamic_shapes=[tuple({0: batch} for _ in inputs)])
    path.write_bytes(to_edge(program).to_executorch().buffer)


def _load_executorch(path: Path, module: L.LightningModule) -> Runner:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda inputs: tuple(found.clone() for found in method.execute(list(inputs)))


def _write_hub(module: L.LightningModule, path: Path, inputs: Inputs) -> None:
    path.mkdir()
    _write_safetensors(module, path / "model.safetensors", inputs)
    config = {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "hyper_parameters": {name: value for name, value in module.hparams.items() if not name.startswith("_")},
        "inputs": [{"shape": ["batch", *one.shape[1:]], "dtype": str(one.dtype)} for one in inputs],
    }
    (path / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def _load_hub(path: Path, module: L.LightningModule) -> Runner:
    return _load_safetensors(path / "model.safetensors", module)


def _write_adapter(module: L.LightningModule, path: Path, inputs: Inputs) -> None:
    adapters.write_adapters(module, path)


def _load_adapter(path: Path, module: L.LightningModule) -> Runner:
    loaded = adapters.with_adapters_of(path, module)
    return lambda inputs: run(loaded, inputs)


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, _load_safetensors),
    "torch": Format(".pt2", _write_torch, _load_torch),
    "onnx": Format(".onnx", _write_onnx, _load_onnx, 'pip install "lightning-fl[export]"'),
    "executorch": Format(".pte", _write_executorch, _load_executorch, "pip install executorch"),
    "hub": Format("", _write_hub, _load_hub),
    "adapter": Format("", _write_adapter, _load_adapter, 'pip install "lightning-fl[language]"'),
}
"""The formats by name."""
