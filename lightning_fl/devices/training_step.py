"""A training step as an ONNX file: forward, loss, backward and optimizer, for runtimes that can only run a graph."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from lightning_fl import torch_internals
from lightning_fl.devices.backward import decompositions
from lightning_fl.devices.update_rules import SGD, Adam, UpdateRule, rule_of
from lightning_fl.types import Tree

TOLERANCE = 1e-4
"""Largest difference of a file's parameters from torch's, relative to the largest parameter."""
RULES: dict[str, UpdateRule] = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adam": Adam()}
"""The optimizers by name, with torch's default settings and a momentum of 0.9."""
PARAMETER, STATE, BATCH, LR = "parameter.", "optimizer.", "batch.", "lr"
"""Prefixes of the names of inputs."""
LOSS, NEXT = "loss", "next."
"""Prefix of the names of outputs: ``next.X`` is the input ``X`` of the next step."""
START = ".safetensors"
"""The suffix of the file with the parameters."""
METADATA = "lightning_fl"
"""The entry of the file's metadata."""
_ROWS = 13  # of the batch that is traced; any number may come later
_CHECKED = (1, 2, 3, 13)

Batch = Sequence[Tensor] | Mapping[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
Pack = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class TrainingStep:
    """An exported training step.

    Args:
        path: The file; the parameters are in the file next to it with the suffix ``.safetensors``.
        parameters: Names of the trained parameters.
        state: Names of the optimizer's tensors.
        batch: Names of the batch's tensors.
        difference: Largest difference of the parameters from torch's after a few steps, relative to the largest.
    """

    path: Path
    parameters: tuple[str, ...]
    state: tuple[str, ...]
    batch: tuple[str, ...]
    difference: float


def export_training_step(
    module: nn.Module,
    example: Batch,
    path: str | Path,
    optimizer: str | torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
) -> TrainingStep:
    r"""Exports one training step as an ONNX file, which any ONNX runtime can run, and compares it with torch.

    .. math::
        (x, s, B, \eta) \mapsto (\ell, x', s'), \qquad \ell = f(x; B), \quad (x', s') = u(x, s, \nabla f, \eta)

    Inputs are the trained parameters, as ``parameter.NAME``, the optimizer's state, as ``optimizer.NAME``, zeros before
    the first step, the batch, as ``batch.0``, ``batch.1`` or ``batch.KEY``, and the learning rate ``lr``. Outputs are
    ``loss`` and for each parameter and state ``next.`` and the input's name. The batch may have any number of examples.
    Frozen parameters and buffers are constants in the file. The module's current parameters, from which a federation of
    devices starts, are written next to it, as ``step.safetensors``.

    Args:
        module: A LightningModule, or any module with ``loss``; it is not changed.
        example: A batch: tensors ``[examples, ...]`` as a sequence or by name.
        path: The file, such as ``step.onnx``.
        optimizer: ``"sgd"``, ``"momentum"`` (0.9), ``"adam"``, or an optimizer of torch with its settings: SGD, Adam or
            AdamW. None: what the module's ``configure_optimizers`` returns.
        loss: Computes the loss, from the module and a batch. None: the module's ``training_step``.

    Raises:
        ValueError: If the step can't be exported, or the file's results differ; then nothing is left behind. Steps that
            change buffers (BatchNorm) or draw random numbers (dropout) are refused.
        ImportError: If a package is missing.
    """
    own = copy.deepcopy(module).cpu().train()
    names, tensors, pack = _unpack(example)
    rule, lr = _rule(own if optimizer is None else module, optimizer)
    step = _Step(own, loss or _training_step(own), rule, pack)
    step.check(pack(tensors))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".step-") as folder:
        unfinished = Path(folder, "step.onnx")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the exporter's own code
                _write(step, names, tensors, lr, unfinished)
                difference = _difference(unfinished, step, names, tensors, lr)
        except ImportError as error:
            needed = 'pip install "lightning-fl[export]"'
            raise ImportError(f"A training step needs more packages: {needed}. ({error})") from error
        # An exporter may raise any exception for a model that it does not support.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"The training step of {type(module).__name__} can't be written: {reason}") from error
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The file does not train like {type(module).__name__}: its parameters differ by {difference:.2g} of "
                f"the largest, more than {TOLERANCE:g}. Nothing was written. If the loss divides by len(y), use "
                "y.shape[0] instead, which follows the size of each batch."
            )
        start = unfinished.with_suffix(START)
        save_file({name: own.contiguous() for name, own in step.params.items()}, start)
        start.replace(path.with_suffix(START))
        unfinished.replace(path)
    return TrainingStep(path, tuple(step.params), tuple(step.state), names, difference)


class _Step:
    """A training step as a function of tensors."""

    def __init__(self, module: nn.Module, loss: Loss, rule: UpdateRule, pack: Pack) -> None:
        self.module, self.loss, self.rule, self.pack = module, loss, rule, pack
        self.params: Tree = {name: own.detach() for name, own in module.named_parameters() if own.requires_grad}
        if not self.params or any(own.dtype != torch.float32 for own in self.params.values()):
            raise ValueError("A training step needs trainable parameters, all of them float32.")
        frozen = {name: own.detach() for name, own in module.named_parameters() if not own.requires_grad}
        self.constants = {**frozen, **dict(module.named_buffers())}
        self.state = rule.state(self.params)
        self._wrapped = _Loss(module, loss)

    def __call__(
        self, params: list[Tensor], state: list[Tensor], batch: list[Tensor], lr: Tensor, constants: list[Tensor]
    ) -> list[Tensor]:
        before = dict(zip(self.params, params, strict=True))
        fixed = dict(zip(self.constants, constants, strict=True))
        kept = dict(zip(self.state, state, strict=True))
        grads, loss = grad_and_value(self._loss_of)(before, fixed, self.pack(batch))
        after, kept = self.rule.step(before, grads, kept, lr)
        return [loss, *(after[name] for name in self.params), *(kept[name] for name in self.state)]

    def _loss_of(self, params: Tree, constants: Tree, batch: Any) -> Tensor:
        tensors = {f"module.{name}": own for name, own in {**constants, **params}.items()}
        return functional_call(self._wrapped, tensors, (batch,))

    def check(self, batch: Any) -> None:
        """Checks that a step changes nothing but the parameters, and is deterministic.

        Raises:
            ValueError: If it does or is not.
        """
        before = {name: own.clone() for name, own in self.module.named_buffers()}
        state = torch.get_rng_state()
        loss = self.loss(self.module, batch)
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
            raise ValueError(f"training_step returned {loss!r:.80}; expected the loss, a scalar tensor.")
        changed = [name for name, own in self.module.named_buffers() if not torch.equal(own, before[name])]
        if changed:
            raise ValueError(
                f"A step changes the buffers {', '.join(changed[:3])}, as BatchNorm does, which an exported training "
                "step can't. Use GroupNorm or LayerNorm."
            )
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            raise ValueError(
                "A step draws random numbers, as dropout does, which an exported training step can't. Remove it."
            )


class _Loss(nn.Module):
    """A module's loss as its ``forward``, as ``functional_call`` requires."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


def _training_step(module: nn.Module) -> Loss:
    if not callable(getattr(module, "training_step", None)):
        raise ValueError(f"{type(module).__name__} has no training_step; give loss=, which computes it.")
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(f"{type(module).__name__} uses manual optimization, which a training step can't.")
    # A device has no logger.
    for name in ("log", "log_dict"):
        setattr(module, name, lambda *args, **kwargs: None)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        found = module.training_step(batch, 0)  # type: ignore[operator]
        return found["loss"] if isinstance(found, Mapping) else found

    return loss


def _unpack(example: Batch) -> tuple[tuple[str, ...], tuple[Tensor, ...], Pack]:
    """Names and tensors of a batch, and a function that rebuilds a batch from tensors."""
    by_name = isinstance(example, Mapping)
    names = tuple(map(str, example)) if by_name else tuple(map(str, range(len(example))))
    values = tuple(example.values()) if isinstance(example, Mapping) else tuple(example)
    if not values or not all(isinstance(own, Tensor) and own.dim() for own in values):
        raise ValueError("The example is not a batch; expected tensors [examples, ...], as a tuple or by name.")
    if len({len(own) for own in values}) != 1 or not len(values[0]):
        raise ValueError(f"The example's tensors have {[len(own) for own in values]} examples; expected equal numbers.")

    def pack(tensors: Sequence[Tensor]) -> Any:
        return dict(zip(names, tensors, strict=True)) if by_name else tuple(tensors)

    return names, values, pack


def _rule(module: nn.Module, optimizer: str | torch.optim.Optimizer | None) -> tuple[UpdateRule, float]:
    if isinstance(optimizer, str):
        if optimizer not in RULES:
            raise ValueError(
                f"Unknown optimizer {optimizer!r}; expected one of {', '.join(RULES)}, or a torch optimizer."
            )
        return RULES[optimizer], 0.001 if optimizer == "adam" else 0.01
    if optimizer is None:
        if not callable(getattr(module, "configure_optimizers", None)):
            raise ValueError(f"{type(module).__name__} has no configure_optimizers; give optimizer=.")
        found = module.configure_optimizers()  # type: ignore[operator]
        optimizer = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"{type(module).__name__}.configure_optimizers returned {type(found).__name__}; expected one optimizer "
                "without a schedule, since the learning rate comes with each step. Give optimizer=."
            )
    return rule_of(optimizer), float(optimizer.param_groups[0]["lr"])


def _rows(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """A batch with ``count`` examples, repeated as needed."""
    return [own[torch.arange(count) % len(own)] for own in tensors]


def _input_names(step: _Step, names: Sequence[str]) -> list[str]:
    return [
        *(PARAMETER + name for name in step.params),
        *(STATE + name for name in step.state),
        *(BATCH + name for name in names),
        LR,
    ]


def _write(step: _Step, names: Sequence[str], tensors: Sequence[Tensor], lr: float, path: Path) -> None:
    inputs = (list(step.params.values()), list(step.state.values()), _rows(tensors, _ROWS), torch.tensor(lr))
    constants = list(step.constants.values())
    program = torch_internals.export_with_any_batch(step, inputs, constants, decompositions())
    found = _input_names(step, names)
    kept = [NEXT + name for name in found[: len(step.params) + len(step.state)]]
    # Not optimized: onnxscript treats adding 1e-8, as in Adam, like adding zero and removes it.
    options: dict[str, Any] = {"dynamo": True, "optimize": False, "verbose": False}
    written = torch.onnx.export(program, input_names=found, output_names=[LOSS, *kept], **options)
    assert written is not None
    model = written.model
    for node in model.graph:
        node.metadata_props.clear()  # the source locations of the nodes
    model.metadata_props[METADATA] = json.dumps({"lr": lr, "rule": repr(step.rule)})
    written.save(path)


def _difference(path: Path, step: _Step, names: Sequence[str], tensors: Sequence[Tensor], lr: float) -> float:
    """The difference between the file and torch's autograd and update rule after steps of several batch sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # hides notes about nodes that can't be simplified
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [given.name for given in session.get_outputs()]
    feeds = {PARAMETER + name: own.numpy() for name, own in step.params.items()}
    feeds |= {STATE + name: own.numpy() for name, own in step.state.items()}
    params, state = list(step.params.values()), list(step.state.values())
    for size in _CHECKED:
        batch = _rows(tensors, size)
        given = {BATCH + name: own.numpy() for name, own in zip(names, batch, strict=True)}
        found = dict(zip(outputs, session.run(None, {**feeds, **given, LR: torch.tensor(lr).numpy()}), strict=True))
        feeds = {name.removeprefix(NEXT): value for name, value in found.items() if name != LOSS}
        _, *after = step(params, state, batch, torch.tensor(lr), list(step.constants.values()))
        params, state = after[: len(params)], after[len(params) :]
    largest = 0.0
    for name, expected in zip(step.params, params, strict=True):
        error = (torch.from_numpy(feeds[PARAMETER + name]) - expected).abs().max()
        relative = float(error / expected.abs().max().clamp_min(1e-12))
        largest = max(largest, relative if relative == relative else float("inf"))
    return largest
