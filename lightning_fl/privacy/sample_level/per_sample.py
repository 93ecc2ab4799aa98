"""Per-sample gradients of a module, from the hooks of Opacus, and their clipped sum."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_fl.privacy.client_level.clipping import ROUNDING
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.privacy.sample_level.rows import num_rows, take_rows
from lightning_fl.torch_internals import BatchNorm
from lightning_fl.tree import as_real
from lightning_fl.types import Tree

GradSampleMode = Literal["hooks", "functorch"]
REMEDY = (
    "training_step must return the mean of losses that depend on one example each: no sum, no class weights or ignored "
    "labels in a weighted mean, no contrast between examples, no selection of the hardest, no normalisation or penalty "
    "over the batch; it may draw random numbers in dropout only (augment in the data set)."
)
NUM_COMPARED = 4096
COLUMNS = 1 << 20
DROPOUT = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
)


def opacus_hooks() -> Any:
    """Imports the class of Opacus that computes per-sample gradients of a module without wrapping it.

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


def why_mixed(module: nn.Module) -> str | None:
    """Returns which layer mixes the examples of a batch, with a remedy; None if none is known to."""
    for name, layer in module.named_modules():
        if isinstance(layer, BatchNorm) and layer.training:
            return (
                f"{name} is a {type(layer).__name__}, which mixes the examples of a batch. Use GroupNorm or LayerNorm: "
                "opacus.validators.ModuleValidator.fix(network) replaces it"
            )
    return None


def why_not_per_sample(module: nn.Module) -> str | None:
    """Returns why a module has no per-sample gradients, with a remedy; None if no reason is known."""
    reason = why_mixed(module)
    if reason is not None:
        return reason
    for name, layer in module.named_modules():
        if getattr(layer, "inplace", False):
            return f"{name} is a {type(layer).__name__} that works in place. Set inplace=False"
        if isinstance(layer, nn.EmbeddingBag):
            return (
                f"{name} is an EmbeddingBag, for which Opacus has no rule. Use nn.Embedding, and mean or sum its rows"
            )
    direct = [name for name, param in module.named_parameters(recurse=False) if param.requires_grad]
    if direct:
        return (
            f"the parameter {direct[0]} belongs to the LightningModule itself, not to a layer with a forward pass. "
            "Move it into a layer: an nn.Module whose forward takes the batch"
        )
    from opacus.validators import ModuleValidator

    errors = [str(error) for error in ModuleValidator.validate(module, strict=False)]
    return errors[0] if errors else None


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Silences torch's warning about backward hooks on a layer whose input needs no gradient, such as the first one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        yield


class PerSampleGradients:
    """Computes the gradient of each example's loss during the backward pass of their mean.

    A resource with a single owner: it installs hooks on the module until :meth:`detach`.

    Args:
        module: The module; unchanged except for hooks.
        params: The trained parameters by name.
        mode: ``"hooks"``: Opacus's rules for known layers, functorch for others; ``"functorch"``: functorch for all.
        tolerance: Tolerance between the gradient and the mean of the per-sample ones, relative to their mean norm.

    Raises:
        ValueError: If Opacus can't compute per-sample gradients of the module.
        ImportError: If Opacus is not installed.
    """

    is_exact = False
    """Whether each gradient is that of one example by construction, so that no comparison is needed."""

    def __init__(
        self,
        module: nn.Module,
        params: Mapping[str, nn.Parameter],
        mode: GradSampleMode = "hooks",
        tolerance: float = 2e-3,
    ) -> None:
        self.module = module
        self.params = dict(params)
        if mode == "hooks":
            _check_rules(module, params)
        self.tolerance = tolerance
        try:
            self.hooks = opacus_hooks()(module, loss_reduction="mean", force_functorch=mode == "functorch")
        except NotImplementedError as error:
            raise ValueError(
                f"Opacus can't compute per-sample gradients of this module: {error}. A layer with parameters must hold "
                "no buffers; replace it."
            ) from error
        self.hooks.disable_hooks()
        # The warnings come from a forward and a backward pass between `start` and `take`, which no `with` block can
        # span.
        self._quiet = ExitStack()

    def detach(self) -> None:
        """Removes the hooks from the module."""
        self._clear()
        self.hooks.cleanup()

    def start(self) -> None:
        """Enables the hooks for one forward and backward pass, before which no parameter has a gradient."""
        self._clear()
        for param in self.params.values():
            param.grad = None
        self._quiet.enter_context(quiet_hooks())
        self.hooks.enable_hooks()

    def of(self, loss_of: Callable[[Any], Tensor], batch: Any) -> Tree:
        """Returns the per-sample gradients of a batch.

        Args:
            loss_of: Returns the loss of a batch.
            batch: The batch.

        Raises:
            PrivacyError: As :meth:`take` does.
        """
        self.start()
        loss = loss_of(batch)
        if loss.requires_grad:
            loss.backward()
        return self.take(num_rows(batch))

    def take(self, size: int) -> Tree:
        """Returns the per-sample gradients after a backward pass, and disables the hooks.

        Args:
            size: Examples in the batch.

        Returns:
            By parameter a tensor of shape ``[size, *param.shape]``; parameters that were not used are left out.

        Raises:
            PrivacyError: If a parameter has a gradient but no per-sample gradients, or they have another shape.
        """
        samples = {}
        for name, param in self.params.items():
            sample = getattr(param, "grad_sample", None)
            # A gradient of zero needs no clipping, for example if the loss does not depend on the parameter.
            if sample is None and param.grad is not None and bool(param.grad.count_nonzero()):
                raise PrivacyError(
                    f"{name} has a gradient, but none per sample, so it can't be clipped. The run stops. Use "
                    "parameters only in the forward pass of their layer, called as layer(x), and let training_step "
                    "penalise no weights: that is the optimizer's weight_decay."
                )
            if sample is None:
                continue
            # Opacus makes a list of them if backward runs more than once.
            if not isinstance(sample, Tensor) or sample.shape != (size, *param.shape):
                found = tuple(sample.shape) if isinstance(sample, Tensor) else f"{len(sample)} parts"
                if found == (1, *param.shape):
                    raise PrivacyError(
                        f"The per-sample gradients of {name} are for one example instead of a batch of {size}: its "
                        "layer got one row for all examples. The run stops. Repeat the row for each example, such as "
                        "position ids of shape [1, n] with position_ids.expand(len(batch), -1)."
                    )
                raise PrivacyError(
                    f"The per-sample gradients of {name} have the shape {found}, expected {(size, *param.shape)}. The "
                    "run stops. A batch must go through the network as a whole, example by example along the first "
                    "dimension, and backward once."
                )
            samples[name] = sample.detach()
        self.hooks.disable_hooks()
        self._clear()
        return samples

    def check_means(self, samples: Tree) -> None:
        """Checks that the gradient of the loss is the mean of the per-sample gradients, on some of its entries.

        Raises:
            PrivacyError: If it is not, because a part of the loss uses a parameter outside its layer.
        """
        for name, sample in samples.items():
            grad = self.params[name].grad
            if grad is None or not sample.numel():
                continue
            # Unpredictable entries, few enough not to slow down a step.
            start = random.SystemRandom().randrange(max(1, grad.numel() - NUM_COMPARED + 1))
            part = slice(start, start + NUM_COMPARED)
            rows = sample.reshape(len(sample), -1)[:, part].double()
            scale = float(torch.linalg.vector_norm(rows, dim=1).mean())
            distance = float((grad.detach().reshape(-1)[part].double() - rows.mean(0)).norm())
            if math.isfinite(scale) and distance > self.tolerance * scale + 1e-12:
                raise PrivacyError(
                    f"The gradient of {name} differs from the mean of the per-sample gradients by "
                    f"{distance / (scale or 1.0):.2g} of their norm: a part of the loss uses the parameter outside its "
                    "layer, so it can be neither clipped nor covered by the noise. The run stops. Use the optimizer's "
                    "weight_decay instead of a weight penalty in training_step. Otherwise use parameters only in the "
                    "forward pass of their layer, or set SampleLevelDP(strict=True)."
                )

    def _clear(self) -> None:
        # Opacus keeps its state on the parameters and layers, and resets it in its own optimizer, which is not used
        # here. Leftovers of a failed pass would be mixed into the next one.
        self._quiet.close()
        for param in self.params.values():
            param.grad_sample = None  # type: ignore[attr-defined]
            param._forward_counter = 0  # type: ignore[attr-defined]
            if hasattr(param, "_current_grad_sample"):
                del param._current_grad_sample
        for layer in self.module.modules():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)


def _check_rules(module: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    """Refuses layers for which Opacus's own rules differ from autograd's gradients."""
    trained = {id(param) for param in params.values()}
    for name, layer in module.named_modules():
        found = ""
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            found = f"an Embedding with padding_idx={layer.padding_idx}"
        elif getattr(layer, "padding_mode", "zeros") != "zeros":
            found = f"a {type(layer).__name__} with padding_mode={layer.padding_mode!r}"
        if found and any(id(param) in trained for param in layer.parameters(recurse=False)):
            raise ValueError(
                f"{name} is {found}, which Opacus's own rules ignore, so its per-sample gradients would be wrong. Set "
                'SampleLevelDP(grad_sample_mode="functorch"), which is correct for it but slower.'
            )


def clipped_sum(samples: Tree, clip: float) -> Tree:
    r"""Returns the sum of gradients, each scaled down to norm ``clip`` if it is longer.

    .. math::
        \sum_i g_i \min(1, C / \lVert g_i \rVert)

    The norm is taken over all parameters together; a gradient that holds NaN or infinities counts as zero.

    Args:
        samples: Per-sample gradients by parameter, each of shape ``[num_samples, ...]``.
        clip: The clip norm :math:`C`.
    """
    if not samples:
        return {}
    # The extra dimension lets parameters without dimensions be flattened in the same way.
    flat = {name: _at_least_float32(sample).unsqueeze(-1).flatten(1) for name, sample in samples.items()}
    # In float64: in float32, a tensor of 5e7 entries comes out too short, and would be clipped to 1.035 C.
    norms = torch.stack([_norms(sample) for sample in flat.values()])
    # The norm of the norms is the joint norm, without a copy of all gradients side by side.
    norms = torch.linalg.vector_norm(norms, dim=0)
    is_finite = norms.isfinite()
    factors = torch.where(is_finite, (clip * (1 - ROUNDING) / norms).clamp(max=1.0), torch.zeros_like(norms))
    if not bool(is_finite.all()):  # a factor of zero is not enough: 0 * NaN is NaN
        flat = {name: torch.where(is_finite[:, None], sample, 0) for name, sample in flat.items()}
    # A product, because the scaled gradients of all examples would take as much memory again.
    return {
        name: (factors.to(flat[name].dtype) @ flat[name]).view(sample.shape[1:]) for name, sample in samples.items()
    }


def _norms(rows: Tensor) -> Tensor:
    """The norms of rows in float64, a part of the columns at a time, because the conversion makes a copy."""
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in rows.split(COLUMNS, dim=1)]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)


def check_clipped_sum(total: Tree, size: int, clip: float) -> None:
    """Checks that a sum of ``size`` clipped gradients is no longer than ``size`` clip norms.

    Raises:
        PrivacyError: If it is longer, or holds NaN.
    """
    norm = math.sqrt(sum(float(_norms(value.reshape(1, -1))) ** 2 for value in total.values()))
    # Negated, so that NaN fails too.
    if not norm <= size * clip * (1 + 1e-5):
        raise PrivacyError(
            f"The sum of {size} gradients clipped to {clip:g} has norm {norm:.6g}. The run stops before it is used."
        )


class WithoutDropout(TorchFunctionMode):
    """Makes dropout the identity inside the block, so that two passes over one example can be compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DROPOUT:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def check_per_sample(
    gradients: PerSampleGradients, loss_of: Callable[[Any], Tensor], batch: Any, tolerance: float
) -> None:
    """Compares the gradients of two examples in one batch, and their clipped sum, with those of each example alone.

    Args:
        gradients: The per-sample gradients to be checked.
        loss_of: Returns the loss of a batch, without side effects.
        batch: A batch of at least one example.
        tolerance: The largest difference that is accepted, relative to the gradients' norm.

    Raises:
        PrivacyError: If they differ, so that one example would change the others' gradients or escape the clip.
    """
    # Two examples show whether they influence each other; a batch of one gives the same example twice.
    both, size = take_rows(batch, [0, min(1, num_rows(batch) - 1)]), 2
    params = list(gradients.params.values())
    with quiet_hooks(), WithoutDropout(), torch.enable_grad():
        alone = [torch.autograd.grad(loss_of(take_rows(both, [i])), params, allow_unused=True) for i in range(size)]
        gradients.start()
        loss_of(both).backward()
        samples = gradients.take(size)
    for param in params:
        param.grad = None
    expected = [_flat(grads, params) for grads in alone]
    found = [
        _flat([samples[name][i] if name in samples else None for name in gradients.params], params) for i in range(size)
    ]
    norms = [float(gradient.norm()) for gradient in expected]
    scale = max([norm for norm in norms if math.isfinite(norm)], default=0.0)
    for gradient, other in zip(expected, found, strict=True):
        if not gradient.isfinite().all() and not other.isfinite().all():
            continue  # clipping treats such a gradient as zero
        distance = float((gradient - other).norm())
        if not distance <= tolerance * scale + 1e-12:
            raise PrivacyError(
                f"The gradient of an example depends on the others in its batch, by {distance / (scale or 1.0):.2g} "
                f"of its norm, so one example has more influence than the noise covers. The run stops. {REMEDY}"
            )
    usable = [(gradient, norm) for gradient, norm in zip(expected, norms, strict=True) if 0 < norm < math.inf]
    if usable:
        clip = min(norm for _, norm in usable) / 2  # below every norm, so that all of them are clipped
        total = clipped_sum(samples, clip)
        oracle = sum(gradient * (clip / norm) for gradient, norm in usable)
        clipped = _flat([total.get(name) for name in gradients.params], params)
        if not float((clipped - oracle).norm()) <= 2 * tolerance * clip * size:
            raise PrivacyError("The gradients are not clipped one by one. The run stops before they are used.")


def _flat(grads: Sequence[Tensor | None], params: Sequence[nn.Parameter]) -> Tensor:
    parts = [torch.zeros_like(param) if grad is None else grad for grad, param in zip(grads, params, strict=True)]
    return torch.cat([as_real(part.detach()).double().flatten() for part in parts])


def _at_least_float32(sample: Tensor) -> Tensor:
    return sample.to(torch.promote_types(sample.dtype, torch.float32))
