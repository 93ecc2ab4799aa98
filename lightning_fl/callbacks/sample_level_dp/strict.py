"""Per-sample gradients by construction: each is the gradient of a loss that depends on one example only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.privacy.sample_level.per_sample import WithoutDropout
from lightning_fl.privacy.sample_level.rows import num_rows
from lightning_fl.strategies.vectorized.log_capture import LogCapture, NotVectorizable
from lightning_fl.torch_internals import pytree, version_counter
from lightning_fl.types import Tree


class StrictGradients:
    r"""Computes :math:`\nabla_\theta \ell(\theta, x_i)` of each example by ``vmap(grad)`` of its own training step.

    The step gets a batch of one example and can't see any other, so it can't combine two of them.

    Args:
        module: The module.
        params: The trained parameters by name.
        context: The precision plug-in's context of a step.
    """

    is_exact = True
    tolerance = 0.0

    def __init__(
        self,
        module: L.LightningModule,
        params: Mapping[str, nn.Parameter],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.module = module
        self.params = dict(params)
        self.arguments: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})
        """The arguments of ``training_step`` besides the batch."""
        self._context = context
        self._capture = LogCapture(module)
        self._step = _Step(module, self._capture)

    def step(self, batch: Any) -> tuple[Tensor, Tree]:
        """Runs the training step for each example of a batch, including its logging.

        Returns:
            The mean of the losses, and the gradients by parameter, of shape ``[num_examples, *param.shape]``.

        Raises:
            PrivacyError: If the step can't run under ``vmap``, or stores a tensor of an example.
        """
        with self._context():
            losses, samples, logged = self._run(batch)
        self._capture.emit(logged, torch.arange(len(losses)), 1)
        self._capture.clear()
        return losses.mean(), samples

    def of(self, loss_of: Callable[[Any], Tensor], batch: Any) -> Tree:
        """The gradients of a batch's examples without logging, without dropout, and in full precision."""
        with WithoutDropout():
            return self._run(batch)[1]

    def _run(self, batch: Any) -> tuple[Tensor, Tree, list[Tensor]]:
        args, kwargs = self.arguments
        size = num_rows(batch)
        leaves, spec = pytree.tree_flatten(batch)
        others = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)}
        if others:
            raise PrivacyError(
                f"A batch holds {', '.join(sorted(others))}; SampleLevelDP(strict=True) needs batches of tensors only."
            )

        def loss_of(params: Tree, row: list[Tensor]) -> Any:
            one = pytree.tree_unflatten([leaf[None] for leaf in row], spec)
            loss, logged = functional_call(self._step, params, (one, *args), dict(kwargs))
            return loss.sum(), (loss.detach().sum(), logged)

        values = {f"module.{name}": param.detach() for name, param in self.params.items()}
        before = _kept(self.module)
        try:
            grads, (losses, logged) = vmap(grad(loss_of, has_aux=True), (None, 0), randomness="different")(
                values, leaves
            )
        except NotVectorizable as error:
            raise PrivacyError(f"{error}. SampleLevelDP(strict=True) can't run such a step.") from error
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise PrivacyError(
                f"SampleLevelDP(strict=True) runs training_step under torch.func.vmap, which raised: {error}. The step "
                "must not write to buffers, read values with .item(), or branch on them."
            ) from error
        now = _kept(self.module)
        written = sorted(name for name in now if name not in before or not now[name].is_still(before[name]))
        if written:
            raise PrivacyError(
                f"training_step stores a tensor of an example in {', '.join(written)}. With "
                "SampleLevelDP(strict=True), nothing may be carried over to another batch; log it instead."
            )
        assert len(losses) == size
        return losses, {name: grads[f"module.{name}"].detach() for name in self.params}, logged

    # ---- the rest of the interface of `PerSampleGradients`; there is no backward pass here

    def start(self) -> None:
        """Does nothing."""

    def take(self, size: int) -> Tree:
        """Returns nothing: the gradients do not come from the backward pass."""
        return {}

    def check_means(self, samples: Tree) -> None:
        """Does nothing: no part of the loss bypasses the per-example gradients."""

    def detach(self) -> None:
        """Does nothing: there are no hooks."""


class _Step(nn.Module):
    """The training step as a forward pass, in which parameters can be replaced."""

    def __init__(self, module: L.LightningModule, capture: LogCapture) -> None:
        super().__init__()
        self.module = module
        self.capture = capture

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.capture(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A tensor and the number of writes to it, compared by identity: under ``vmap`` a tensor's values can't be read."""

    tensor: Tensor
    num_writes: int

    def is_still(self, other: _Kept) -> bool:
        return self.tensor is other.tensor and self.num_writes == other.num_writes


def _kept(module: nn.Module) -> dict[str, _Kept]:
    """The tensors that a module stores besides its parameters."""
    kept = {
        f"{name}.{key}".lstrip("."): value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    }
    kept.update(module.named_buffers())
    return {name: _Kept(value, version_counter(value)) for name, value in kept.items()}
