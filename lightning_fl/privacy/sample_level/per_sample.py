"""Per-sample gradients of a module, through the hooks of Opacus, and what is made of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_fl.privacy.client_level.clipping import ROUNDING
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.privacy.sample_level.rows import num_rows, take_rows
from lightning_fl.types import Tree

GradSampleMode = Literal["hooks", "functorch"]
DROPOUT = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
)


def opacus_hooks() -> Any:
    """The class of Opacus that computes per-sample gradients of a module without wrapping it.

    Raises:
        ImportError: If Opacus is not installed.
    """
    try:
        from opacus.grad_sample import GradSampleHooks
    except ImportError as error:
        raise ImportError(
            "Per-sample gradients need opacus, which is not installed: pip install 'lightning-fl[privacy]'"
        ) from error
    return GradSampleHooks


def why_not_per_sample(module: nn.Module) -> str | None:
    """Why a module's gradients can't be told apart by example, with the remedy; None if nothing is known against it."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            return (
                f"{name} is a {type(layer).__name__}, which mixes the examples of a batch. Use GroupNorm or LayerNorm: "
                "opacus.validators.ModuleValidator.fix(network) replaces it"
            )
        if getattr(layer, "inplace", False):
            return f"{name} is a {type(layer).__name__} that works in place. Set inplace=False"
    own = [name for name, param in module.named_parameters(recurse=False) if param.requires_grad]
    if own:
        return (
            f"the parameter {own[0]} belongs to the LightningModule itself, which has no forward pass of its own. Move "
            "it into a layer: an nn.Module whose forward takes the batch"
        )
    from opacus.validators import ModuleValidator

    errors = [str(error) for error in ModuleValidator.validate(module, strict=False)]
    return errors[0] if errors else None


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Inside the block torch does not warn of a hook on a layer whose input needs no gradient, as the first one's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        yield


class PerSampleGradients:
    """The gradient of each example's loss, computed along with the backward pass of a loss that is their mean.

    Args:
        module: The module; it stays as it is, hooks apart.
        params: The trained parameters by name.
        mode: ``"hooks"``: Opacus's own rules for known layers and functorch for others; ``"functorch"`` for all.

    Raises:
        ValueError: If Opacus can't tell the module's gradients apart by example.
        ImportError: If Opacus is not installed.
    """

    def __init__(self, module: nn.Module, params: Mapping[str, nn.Parameter], mode: GradSampleMode = "hooks") -> None:
        self.module = module
        self.params = dict(params)
        try:
            self._hooks = opacus_hooks()(module, loss_reduction="mean", force_functorch=mode == "functorch")
        except NotImplementedError as error:
            raise ValueError(
                f"Opacus can't compute per-sample gradients of this module: {error}. A layer with parameters must hold "
                "no buffers; replace it."
            ) from error
        self._hooks.disable_hooks()
        self._quiet = ExitStack()

    def detach(self) -> None:
        """Takes the hooks off the module."""
        self._clear()
        self._hooks.cleanup()

    def start(self) -> None:
        """A forward and a backward pass come."""
        self._clear()
        self._quiet.enter_context(quiet_hooks())
        self._hooks.enable_hooks()

    def take(self, size: int) -> Tree:
        """The per-sample gradients after a backward pass.

        Args:
            size: Examples in the batch.

        Returns:
            By parameter a tensor of shape ``[size, *param.shape]``; parameters that had no part are left out.

        Raises:
            PrivacyError: If there is a gradient without them, or they are of another shape.
        """
        samples = {}
        for name, param in self.params.items():
            sample = getattr(param, "grad_sample", None)
            if sample is None and param.grad is not None and bool(param.grad.count_nonzero()):
                raise PrivacyError(
                    f"{name} has a gradient, but none per sample, so it can't be clipped. The run stops. Use "
                    "parameters only in the forward pass of their layer, called as layer(x), and let training_step "
                    "penalise no weights: that is the optimizer's weight_decay."
                )
            if sample is None:
                continue
            if not isinstance(sample, Tensor) or sample.shape != (size, *param.shape):
                found = tuple(sample.shape) if isinstance(sample, Tensor) else f"{len(sample)} parts"
                raise PrivacyError(
                    f"The per-sample gradients of {name} have the form {found}, expected {(size, *param.shape)}. The "
                    "run stops. A batch must go through the network as a whole, example by example along the first "
                    "dimension, and backward once."
                )
            samples[name] = sample.detach()
        self._hooks.disable_hooks()
        self._clear()
        return samples

    def _clear(self) -> None:
        self._quiet.close()
        for param in self.params.values():
            param.grad_sample = None  # type: ignore[attr-defined]
            param._forward_counter = 0  # type: ignore[attr-defined]
            if hasattr(param, "_current_grad_sample"):
                del param._current_grad_sample
        for layer in self.module.modules():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)


def clipped_sum(samples: Tree, clip: float) -> Tree:
    r"""The sum of gradients, each shortened to the norm ``clip`` if it is longer.

    .. math::
        \sum_i g_i \min(1, C / \lVert g_i \rVert)

    The norm is that of all parameters together; a gradient that holds NaN or infinities counts as zero.

    Args:
        samples: Per-sample gradients by parameter, each of shape ``[num_samples, ...]``.
        clip: The largest norm :math:`C`.
    """
    if not samples:
        return {}
    flat = {name: _at_least_float32(sample).unsqueeze(-1).flatten(1) for name, sample in samples.items()}
    norms = torch.stack([torch.linalg.vector_norm(sample, dim=1) for sample in flat.values()])
    norms = torch.linalg.vector_norm(norms, dim=0)
    is_finite = norms.isfinite()
    factors = torch.where(is_finite, (clip * (1 - ROUNDING) / norms).clamp(max=1.0), torch.zeros_like(norms))
    if not bool(is_finite.all()):
        flat = {name: torch.where(is_finite[:, None], sample, 0) for name, sample in flat.items()}
    return {
        name: (factors.to(flat[name].dtype) @ flat[name]).view(sample.shape[1:]) for name, sample in samples.items()
    }


def check_clipped_sum(total: Tree, size: int, clip: float) -> None:
    """Makes sure that a sum of ``size`` gradients is no longer than that many clip norms.

    Raises:
        PrivacyError: If it is, or holds NaN.
    """
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(value).double()) ** 2 for value in total.values()))
    if not norm <= size * clip * (1 + 1e-5):
        raise PrivacyError(
            f"The sum of {size} gradients clipped to {clip:g} has norm {norm:.6g}. The run stops before it is used."
        )


class WithoutDropout(TorchFunctionMode):
    """Inside the block dropout lets everything through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DROPOUT:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def check_per_sample(
    gradients: PerSampleGradients, loss_of: Callable[[Any], Tensor], batch: Any, tolerance: float
) -> None:
    """Compares the gradients of two examples in one batch with those of each alone, and their clipped sum.

    Args:
        gradients: The per-sample gradients to be checked.
        loss_of: The loss of a batch, without a trace.
        batch: A batch of at least one example.
        tolerance: How much they may differ, relative to their norm.

    Raises:
        PrivacyError: If they differ, so that one example would change the others' or escape the clip.
    """
    both, size = take_rows(batch, [0, min(1, num_rows(batch) - 1)]), 2
    params = list(gradients.params.values())
    with quiet_hooks(), WithoutDropout(), torch.enable_grad():
        alone = [torch.autograd.grad(loss_of(take_rows(both, [i])), params, allow_unused=True) for i in range(size)]
        gradients.start()
        loss_of(both).backward()
        samples = gradients.take(size)
    for param in params:
        param.grad = None
    expected = [_flat(own, params) for own in alone]
    found = [
        _flat([samples[name][i] if name in samples else None for name in gradients.params], params) for i in range(size)
    ]
    norms = [float(own.norm()) for own in expected]
    scale = max([norm for norm in norms if math.isfinite(norm)], default=0.0)
    for own, other in zip(expected, found, strict=True):
        if not own.isfinite().all() and not other.isfinite().all():
            continue  # an example without a gradient, which counts as zero
        distance = float((own - other).norm())
        if not distance <= tolerance * scale + 1e-12:
            raise PrivacyError(
                f"The gradient of an example changes with the others in its batch, by {distance / (scale or 1.0):.2g} "
                "of its norm, so one example moves more than the noise covers. The run stops. training_step must "
                "return the mean of losses that depend on one example each: no sum, no class weights or ignored labels "
                "in a weighted mean, no contrast between examples, no normalisation or penalty over the batch; it may "
                "draw random numbers in dropout only (augment in the data set)."
            )
    lengths = [(own, norm) for own, norm in zip(expected, norms, strict=True) if 0 < norm < math.inf]
    if lengths:
        clip = min(norm for _, norm in lengths) / 2
        total = clipped_sum(samples, clip)
        oracle = sum(own * (clip / norm) for own, norm in lengths)
        clipped = _flat([total.get(name) for name in gradients.params], params)
        if not float((clipped - oracle).norm()) <= 2 * tolerance * clip * size:
            raise PrivacyError("The gradients are not clipped one by one. The run stops before they are used.")


def _flat(grads: Sequence[Tensor | None], params: Sequence[nn.Parameter]) -> Tensor:
    parts = [torch.zeros_like(param) if grad is None else grad for grad, param in zip(grads, params, strict=True)]
    return torch.cat([part.detach().double().flatten() for part in parts])


def _at_least_float32(sample: Tensor) -> Tensor:
    return sample.to(torch.promote_types(sample.dtype, torch.float32))
