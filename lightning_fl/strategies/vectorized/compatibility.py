"""Checks whether several clients can train in one step with the result that each has alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.rank_zero import rank_zero_debug, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from lightning_fl.engines import Vectorized, VectorizedEngine
from lightning_fl.engines.capture import tolerances
from lightning_fl.engines.vectorized.stacking import NotVectorizable, part
from lightning_fl.seeding import isolated_randomness
from lightning_fl.strategies.hooks import BATCH_HOOKS, TRANSFER_HOOKS, has_hooks, hooks_of
from lightning_fl.strategies.internals import trainer_replaced
from lightning_fl.strategies.vectorized.log_capture import LogCapture
from lightning_fl.strategies.vectorized.step_watch import OpaqueProxy, StepWatch, random_states
from lightning_fl.torch_internals import has_backward_hooks, has_gradient_hooks, pytree, step_hooks, version_counter
from lightning_fl.types import Phase

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")
"""Optimizers of ``torch.optim`` that treat each element alone, so that they can step stacked parameters."""
MAX_FLOPS_ON_CPU = 3e7
"""FLOPs per client step above which vectorizing no longer pays on a CPU."""


def unsupported_reason(trainer: L.Trainer, module: L.LightningModule, strategy: Any) -> str | None:
    """Why this fit's clients can't train in one step; None if nothing is known against it."""
    optimizers, algorithm = strategy.optimizers, strategy.algorithm
    names = [type(optimizer).__name__ for optimizer in optimizers]
    if not module.automatic_optimization:
        return "the module optimizes by hand (automatic_optimization=False)"
    if not all(_is_elementwise(optimizer) for optimizer in optimizers):
        return f"{', '.join(names)} is not known to treat each element of a parameter alone"
    if any(group.get("fused") for optimizer in optimizers for group in optimizer.param_groups):
        return f"{names[0]}(fused=True) counts its steps on the device"
    if any(_has_hooks_of_user(optimizer) for optimizer in optimizers):
        return f"hooks on {names[0]} would see the parameters of several clients"
    if any(map(has_gradient_hooks, module.parameters())):
        return "hooks on a parameter would see its gradients of several clients"
    if any(map(has_backward_hooks, module.modules())):
        return "backward hooks of a submodule do not run for several clients at once"
    is_one = isinstance(strategy.engine, Vectorized) and strategy.engine.stacks_one
    if not is_one and any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m in module.modules()):
        return "torch.func.vmap gives the padding of an embedding a gradient"
    of_module = set(map(id, module.parameters()))
    if any(id(param) not in of_module for o in optimizers for group in o.param_groups for param in group["params"]):
        return "an optimizer has parameters that are not the module's"
    if type(module).log is not L.LightningModule.log:
        return "the module logs in a way of its own"
    if type(module).clip_gradients is not L.LightningModule.clip_gradients:
        return "the module clips gradients in a way of its own"
    if strategy.client_optimizer == "keep":
        return "client_optimizer='keep' gives each client its own number of steps"
    if algorithm.probe is not None or algorithm.phases() != (Phase(),):
        return f"{type(algorithm).__name__} looks at each client's data by itself"
    if trainer.precision == "16-mixed":
        return "precision='16-mixed' skips a step when one client's gradients overflow"
    hooks = [name for name in BATCH_HOOKS if has_hooks(trainer, name)]
    for hook in hooks + _transfer_hooks(getattr(trainer, "datamodule", None)):
        return f"the hook {hook} would see several clients at once"
    # A monitor of learning rates does not look at the batch that it is given.
    own = [hook for c in trainer.callbacks if type(c) is not LearningRateMonitor for hook in hooks_of(c)]  # type: ignore[attr-defined]
    for hook in own:
        return f"{hook} would see several clients at once"
    for hook in _client_hooks(trainer):
        return f"{hook} looks at each client by itself"
    return None


def _client_hooks(trainer: L.Trainer) -> list[str]:
    names = ("on_client_start", "on_phase_end", "on_next_phase", "on_client_end", "run_training_step")
    found = [getattr(c, name, None) for c in trainer.callbacks for name in names]  # type: ignore[attr-defined]
    own = [getattr(hook, "__qualname__", "a hook") for hook in found if hook is not None]
    return [name for name in own if not name.startswith("FederatedCallback.")]


def _has_hooks_of_user(optimizer: Optimizer) -> bool:
    return any(not getattr(hook, "__module__", "").startswith("lightning_fl.") for hook in step_hooks(optimizer))


def _is_elementwise(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim.") and kind.__name__ in ELEMENTWISE


def _transfer_hooks(datamodule: Any) -> list[str]:
    base = L.LightningDataModule
    return [
        name for name in TRANSFER_HOOKS if datamodule and getattr(type(datamodule), name) is not getattr(base, name)
    ]


def unprofitable_reason(module: nn.Module, max_clients: int) -> str | None:
    """Why training clients in one step would not be faster; None if it should be."""
    slow = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNNBase)
    if next(module.parameters()).device.type == "cpu" and any(isinstance(m, slow) for m in module.modules()):
        return "convolutions and recurrent layers of several clients are no faster together on a CPU"
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        return "recurrent layers of several clients are computed cell by cell, which is not known to be faster"
    if max_clients < 4:
        return "the model is so large that its own arithmetic takes most of the time"
    return None


def check_equivalence(
    engine: VectorizedEngine,
    capture: LogCapture,
    watch: StepWatch,
    batch: Any,
    args: tuple[Any, ...],
    allows_random: bool,
    max_flops: float = math.inf,
) -> str:
    """Compares one step of several clients with the same step of two of them alone.

    The clients' tensors are not what they were afterwards, so the group is to be loaded anew; nothing else is changed.

    Args:
        engine: The engine, with the clients loaded.
        capture: Records what the clients log.
        watch: Sees and puts back what else the step changes.
        batch: Their batches, stacked.
        args: The other arguments of ``training_step``.
        allows_random: Whether random numbers may differ from those that a client alone would draw.
        max_flops: The floating-point operations of one client's step above which training together does not pay off.

    Returns:
        The ``randomness`` of ``torch.func.vmap``: ``"error"``, or ``"different"`` if the step draws random numbers and
        that is allowed.

    Raises:
        OutOfMemoryError: If a GPU's memory does not hold the step.
        NotVectorizable: If the step can't run under ``vmap``, gives different losses or gradients, has side effects,
            or takes so long that training together would gain nothing.
    """
    trial = partial(_try_step, engine, capture, watch, batch, args, max_flops)
    if engine.stacks_one:
        # The random numbers with which it is compared: without `vmap` they are those of a client alone.
        with _repeatable_kernels(engine.device), isolated_randomness(0, 0, 0):
            trial("different")
        return "different"
    try:
        with _repeatable_kernels(engine.device):
            trial("error")
    except NotVectorizable as error:
        if not allows_random or str(error) != DRAWS:
            raise
        rank_zero_warn(
            "training_step draws random numbers (dropout, say). Clients that train together draw others than alone: "
            "the results are equal in distribution, not in value. engine='sequential' draws each client's own."
        )
        trial("different")
        return "different"
    return "error"


@contextmanager
def _repeatable_kernels(device: torch.device) -> Iterator[None]:
    """A block in which a GPU computes float32 in full, and the same in each call: TF32 keeps 10 bits of 23."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _try_step(
    engine: VectorizedEngine,
    capture: LogCapture,
    watch: StepWatch,
    batch: Any,
    args: tuple[Any, ...],
    max_flops: float,
    randomness: str,
) -> None:
    buffers = engine.copy_buffers()
    versions = _versions(engine, batch)
    watch.begin_trial()
    drawn = random_states()
    try:
        with torch.enable_grad():
            losses, logged = engine.forward_stacked(capture, batch, *args, randomness=randomness)
            if losses.dim() != 1:
                raise NotVectorizable(f"training_step returned a loss of shape {tuple(losses.shape[1:])}, not a number")
            made = capture.made
            grads = engine.gradients(losses.sum())
        changed = watch.end_trial()
        if changed is not None:
            raise NotVectorizable(f"training_step changes {changed}, which would hold values of several clients")
        if _versions(engine, batch) != versions:
            raise NotVectorizable("training_step changes its batch or the parameters in place")
        if random_states()[1:] != drawn[1:] or (randomness == "error" and random_states() != drawn):
            raise NotVectorizable("training_step draws random numbers from Python or NumPy, one for all clients")
        written = engine.restore_frozen()  # also those that were written to through `param.data`
        if written:
            raise NotVectorizable(f"training_step changes {written[0]}, which all clients share")
        # The step has moved the clients' BatchNorm statistics; the comparison must start from the same ones.
        after = engine.copy_buffers()
        engine.put_buffers(buffers)
        if randomness == "error" or engine.stacks_one:
            with torch.enable_grad():
                found = _Outcome(losses.detach(), grads, after, logged, made)
                _compare(engine, capture, batch, args, found, max_flops)
    except (NotVectorizable, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NotVectorizable(reason_of(error)) from error
    finally:
        watch.end_trial()
        capture.clear()


def _versions(engine: VectorizedEngine, batch: Any) -> list[int]:
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [version_counter(leaf) for leaf in (*leaves, *engine.stacked_params.values())]


@dataclass(frozen=True)
class _Outcome:
    """What a step of several clients has given, stacked."""

    losses: Tensor
    grads: Any
    buffers: Any
    logged: Any
    made: list[Any]


def _compare(
    engine: VectorizedEngine,
    capture: LogCapture,
    batch: Any,
    args: tuple[Any, ...],
    together: _Outcome,
    max_flops: float,
) -> None:
    losses, grads = together.losses, together.grads
    for client in {0, len(losses) - 1}:
        # With random numbers of its own, which also shows draws after which the step puts the generators back.
        with FlopCounterMode(display=False) as counter, isolated_randomness(0, 0, client):
            alone = engine.step_alone(capture, client, part(batch, client), *args)
        if counter.get_total_flops() > max_flops:
            raise NotVectorizable("the arithmetic of a step takes longer than what a step of several would save")
        loss, own = alone.loss, alone.grads
        rtol = max(1e-3, 4 * torch.finfo(loss.dtype).eps)
        if not torch.allclose(losses[client], loss, rtol=rtol, atol=1e-5, equal_nan=True):
            raise NotVectorizable(f"the loss of a client together is {losses[client]:g}, alone {loss:g}")
        if own.keys() != grads.keys():
            (name, *_) = own.keys() ^ grads.keys()
            raise NotVectorizable(f"the gradient of {name} together differs from that of a client alone")
        # With a NaN the tolerance would be NaN, and gradients that agree, NaN for NaN, would count as different.
        largest = max(float(grad.nan_to_num(0, 0, 0).abs().max()) for grad in own.values())
        for name, grad in own.items():
            rtol, atol = tolerances(grad, largest)
            if not torch.allclose(grads[name][client], grad, rtol=rtol, atol=atol, equal_nan=True):
                raise NotVectorizable(f"the gradient of {name} together differs from that of a client alone")
        for name, buffer in alone.buffers.items():
            if not _is_close(together.buffers[name][client], buffer):
                raise NotVectorizable(f"the buffer {name} together differs from that of a client alone")
        is_logged_alike = capture.made == together.made and all(
            map(_is_close, part(together.logged, client), alone.others)
        )
        if not is_logged_alike:
            raise NotVectorizable("what is logged together differs from what a client alone logs")


def _is_close(together: Tensor, alone: Tensor) -> bool:
    if together.shape != alone.shape:
        return False
    return torch.allclose(together.double(), alone.double(), rtol=1e-3, atol=1e-5, equal_nan=True)


DRAWS = "training_step draws random numbers (dropout, say), and clients together would draw others than alone"
_REASONS = {
    "random operation": DRAWS,
    "item()": "training_step reads a number out of a tensor (.item(), float()), and several clients have several",
    "data-dependent control flow": "training_step decides by a tensor's values (`if loss > 1`), which differ",
    "dynamic shape": "an operation's result has another shape for each client",
    "data-dependent": "an operation's result has another shape for each client",
    "in-place": "training_step writes a client's values into a tensor that all share",
    "inplace": "training_step writes a client's values into a tensor that all share",
    "numpy": "training_step turns a tensor into a NumPy array, and several clients have several",
}


def reason_of(error: Exception) -> str:
    """What prevents a step of several clients, in a sentence for users."""
    if isinstance(error, NotVectorizable):
        return str(error)
    # What `vmap` can't do shows as errors of many types, raised deep inside torch; its text asks to file an issue.
    text = str(error)
    found = next((reason for word, reason in _REASONS.items() if word in text), None)
    rank_zero_debug(f"A step of several clients raised {type(error).__name__}: {text}")
    return found or f"an operation of training_step does not run for several clients at once ({type(error).__name__})"


def params_with_gradients(
    engine: VectorizedEngine, capture: LogCapture, batch: Any, args: tuple[Any, ...], randomness: str
) -> frozenset[str] | None:
    """The parameters that get a gradient in a step of several clients; leaves nothing changed.

    Returns:
        None if the step reads the Trainer or ``batch_idx``, so that it may do something else the next time.
    """
    stand_in, buffers = OpaqueProxy(), engine.copy_buffers()
    try:
        with (
            trainer_replaced(capture.module, stand_in),
            # A trial must not take random numbers away from the steps that count.
            torch.random.fork_rng(enabled=randomness != "error"),
            torch.enable_grad(),
        ):
            losses, _ = engine.forward_stacked(capture, batch, *[stand_in] * len(args), randomness=randomness)
            names = frozenset(engine.gradients(losses.sum()))
    except Exception:
        return None
    finally:
        engine.put_buffers(buffers)
        capture.clear()
    return None if stand_in.is_seen else names
