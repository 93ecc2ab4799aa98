r"""Checks that an example influences only its own gradient, from the data set to the gradient.

The noise covers a sum of clipped gradients only if each of them is a function of one example:
:math:`\sum_{i \in B} g_i = \sum_{i \in B \setminus r} g_i + g_r` for every example r. So batches are compared
with the same batches without one example.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_fl.data.targets import stored_labels
from lightning_fl.engines.module_state import Snapshot
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.privacy.sample_level.per_sample import (
    REMEDY,
    PerSampleGradients,
    WithoutDropout,
    check_per_sample,
    quiet_hooks,
)
from lightning_fl.privacy.sample_level.rows import labels_of, largest_value, num_rows, take_rows
from lightning_fl.privacy.sample_level.tensor_watch import TensorWatch
from lightning_fl.types import Tree

NUM_EXAMPLES = 8
"""Maximum number of examples that are read from the data set for a check."""
NUM_DIRECTIONS = 8
MAX_TOTAL = 0.01
"""Maximum change of all other gradients together, in clip norms, beyond rounding."""
LARGE = 1e3
"""From this magnitude on, float32 products may differ by more than the tolerance if large ones cancel."""
CHUNK = 1 << 20


class WithoutClassWeights(WithoutDropout):
    """Also refuses a loss that is divided by the sum of the batch's class weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.cross_entropy, functional.nll_loss):
            given = kwargs or {}
            weight = given.get("weight", args[2] if len(args) > 2 else None)
            if weight is not None and given.get("reduction", "mean") == "mean" and bool((weight != weight[0]).any()):
                raise PrivacyError(
                    f"{func.__name__}(weight=...) divides by the sum of the class weights in the batch, so an example "
                    "of a class with a large weight reduces the gradients of all others by more than the noise covers. "
                    "The run stops. Weight each example's own loss: "
                    f"(class_weights[y] * {func.__name__}(logits, y, reduction='none')).mean()."
                )
        return super().__torch_function__(func, types, args, kwargs)


@dataclass
class _Rows:
    """The gradients of a batch's examples: their norms, and their projections on a few random directions."""

    norms: Tensor
    projected: Tensor

    def __getitem__(self, rows: Any) -> _Rows:
        return _Rows(self.norms[rows], self.projected[rows])

    def clipped(self, clip: float) -> Tensor:
        factors = (clip / self.norms.clamp(min=1e-300)).clamp(max=1.0)
        return factors[:, None] * self.projected


class Gradients(Protocol):
    """Per-sample gradients, as the check needs them."""

    params: dict[str, nn.Parameter]

    @property
    def is_exact(self) -> bool:
        """Whether each gradient is that of one example by construction."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    def of(self, loss_of: Callable[[Any], Tensor], batch: Any) -> Tree:
        """Returns the per-sample gradients of a batch."""


@dataclass
class SelfCheck:
    """Compares gradients of examples in different batches.

    Args:
        gradients: The per-sample gradients to be checked.
        loss_of: Returns the loss of a batch.
        step: Runs a whole training step on a batch, with the module's hooks around it, for its side effects.
        reseed: Sets all random generators to the same state.
        state: The module's state, which is restored after each comparison.
        params: Detects writes to the parameters.
        clip: The clip norm.
        tolerance: The largest difference of two gradients that counts as rounding, relative to the largest norm.
    """

    gradients: Gradients
    loss_of: Callable[[Any], Tensor]
    step: Callable[[Any], None]
    reseed: Callable[[], None]
    state: Snapshot
    params: TensorWatch
    clip: float
    tolerance: float

    def run(self, batch: Any, read: Callable[[Sequence[int]], Any], examples: Sequence[int]) -> None:
        """Runs all comparisons, and leaves the module unchanged.

        Args:
            batch: The batch of the current step.
            read: Reads examples of the data set, collates them and moves them to the device, as for training.
            examples: Some examples of the data set, which differ in label if that is possible.

        Raises:
            PrivacyError: If one example changes the gradients of others.
        """
        try:
            with exact_products():
                if len(examples) > 1:
                    self._of_history(self._pass(lambda: read(examples)))
                if self.gradients.is_exact:
                    return
                if len(examples) > 1:
                    # The step's own batch may lack the label that reveals the difference.
                    self._of_step(self._pass(lambda: read(examples)))
                self._of_step(batch)
                if len(examples) > 1:
                    self._of_reading(read, examples)
        except PrivacyError as error:
            hint = self._if_large(batch)
            if not hint:
                raise
            raise PrivacyError(f"{error}{hint}") from error
        finally:
            self.state.restore()
            for param in self.gradients.params.values():
                param.grad = None

    def _if_large(self, batch: Any) -> str:
        """Another possible reason, if values are so large that rounding depends on the size of the batch."""
        if any(param.dtype == torch.float64 for param in self.gradients.params.values()):
            return ""
        largest = largest_value(batch)
        if largest < LARGE:
            return ""
        return (
            f" Or it is rounding: the batch holds values up to {largest:.2g}, and float32 products of such large "
            "values depend on the size of the batch. Then scale the features to about 1, or train with "
            "precision='64-true', with which the check can distinguish the two."
        )

    def _of_step(self, batch: Any) -> None:
        size = num_rows(batch)
        removed, *others = unlike_rows(batch)
        if size > 1:
            kept = [row for row in range(size) if row != removed]
            whole, rest = self._measure(batch), self._measure(take_rows(batch, kept))
            self._compare(whole[kept], rest, "training_step", REMEDY)
        pair = take_rows(batch, [removed, others[0] if others else removed])

        def loss_of(rows: Any) -> Tensor:
            self._fresh()
            return self.loss_of(rows)

        assert isinstance(self.gradients, PerSampleGradients)
        check_per_sample(self.gradients, loss_of, pair, self.tolerance)

    def _of_reading(self, read: Callable[[Sequence[int]], Any], examples: Sequence[int]) -> None:
        whole = self._measure(lambda: read(examples))
        for some in (examples[:-1], examples[:1]):
            part = self._measure(lambda some=some: read(some))
            # A collate function may sort its examples, so each is compared with the most similar one.
            apart = torch.cdist(part.projected, whole.projected).nan_to_num(torch.inf)
            # Those that are not finite are like each other.
            apart[~part.norms.isfinite()[:, None] & ~whole.norms.isfinite()] = 0.0
            self._compare(
                whole[apart.argmin(1)],
                part,
                "reading a batch (collate_fn, on_before_batch_transfer, on_after_batch_transfer)",
                "Let collate_fn and the transfer hooks process each example separately: no MixUp, no batch statistics, "
                "and padding only where the loss masks it; or move such processing into the data set.",
            )

    def _of_history(self, batch: Any) -> None:
        half = num_rows(batch) // 2
        found: list[_Rows] = []
        names: set[str] = set()
        for rows in (slice(half), slice(half, None)):
            self._fresh()
            self._pass(lambda rows=rows: self.step(take_rows(batch, rows)))  # type: ignore[misc]
            names.update(self.state.differences())
            found.append(self._measure(batch, is_fresh=False))
        where = f"what the module keeps from one batch to the next ({', '.join(sorted(names)) or 'a global variable'})"
        self._compare(
            found[0],
            found[1],
            where,
            "Training must not depend on values that earlier batches stored in buffers, persistent or not, or in "
            "attributes: no running statistics, memory banks or queues. Step counters are allowed.",
            by="those of an earlier batch",
        )

    def _fresh(self) -> None:
        self.state.restore()
        self.reseed()

    def _pass(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except PrivacyError:
            raise
        except Exception as error:
            raise PrivacyError(
                f"A batch of other examples or another size raised {type(error).__name__}: {error}. The run stops. "
                "Poisson batches can have any size, and sample-level privacy checks that each example's gradient "
                "depends on it alone: training_step and collate_fn must work with a single example."
            ) from error

    def _measure(self, batch: Any, is_fresh: bool = True) -> _Rows:
        """The gradients of the examples in a batch, or in a function's result, computed from the original state."""
        if is_fresh:
            self.state.restore()
        self.reseed()

        def samples() -> tuple[Tree, int]:
            rows = batch() if callable(batch) else batch
            return self.gradients.of(self.loss_of, rows), num_rows(rows)

        # If examples are processed alone, the sum of the class weights is that of one example.
        mode = WithoutDropout() if self.gradients.is_exact else WithoutClassWeights()
        with quiet_hooks(), mode, torch.enable_grad():
            found, size = self._pass(samples)
        self.params.check("in training_step")
        return _rows_of(found, size)

    def _compare(
        self, found: _Rows, expected: _Rows, where: str, remedy: str, by: str = "the others in its batch"
    ) -> None:
        finite = found.norms.isfinite() & expected.norms.isfinite()
        # Clipping treats a non-finite gradient as zero; one that is finite only in another batch is detected.
        agrees = finite | (~found.norms.isfinite() & ~expected.norms.isfinite())
        found, expected = found[finite], expected[finite]
        scale = float(torch.cat([found.norms, expected.norms, torch.zeros(1)]).max())
        apart = _length(found.projected - expected.projected)
        largest = float(apart.max()) / (scale or 1.0) if len(apart) else 0.0
        moved = float(_length(found.clipped(self.clip) - expected.clipped(self.clip)).sum()) / self.clip
        rounding = self.tolerance * max(len(apart), 1) / 10
        if bool(agrees.all()) and largest <= self.tolerance and moved <= MAX_TOTAL + rounding:
            return
        raise PrivacyError(
            f"The gradient of an example depends on {by}, by {largest:.2g} of its norm, through {where}: all gradients "
            f"together change by {1 + moved:.3g} clip norms, but the noise covers 1. The run stops. {remedy}"
        )


def unlike_rows(batch: Any) -> list[int]:
    """The rows of a batch, rare labels first, and one of each label before a second of any."""
    size, labels = num_rows(batch), labels_of(batch)
    return by_rarity(list(range(size)) if labels is None else labels.tolist())


def by_rarity(labels: Sequence[Any]) -> list[int]:
    """Positions ordered with rare labels first, and one of each label before a second of any."""
    order = random.SystemRandom().sample(range(len(labels)), len(labels))
    seen: dict[Any, list[int]] = {}
    for position in order:
        seen.setdefault(labels[position], []).append(position)
    groups = sorted(seen.values(), key=len)
    return [group[turn] for turn in range(max(map(len, groups), default=0)) for group in groups if turn < len(group)]


def unlike_examples(dataset: Any) -> list[int]:
    """A few random examples of a data set; the last one has the rarest label, if labels are known."""
    labels = stored_labels(dataset)
    if labels is None or not len(labels):
        return random.SystemRandom().sample(range(len(dataset)), min(NUM_EXAMPLES, len(dataset)))
    names, counts = np.unique(labels, return_counts=True)
    rarest = names[np.argsort(counts, kind="stable")[:NUM_EXAMPLES]]
    chosen = [random.SystemRandom().choice(np.flatnonzero(labels == name).tolist()) for name in rarest]
    for example in random.SystemRandom().sample(range(len(labels)), min(2 * NUM_EXAMPLES, len(labels))):
        if len(chosen) < NUM_EXAMPLES and example not in chosen:
            chosen.append(example)
    return chosen[::-1]


@contextmanager
def exact_products() -> Iterator[None]:
    """Computes products in full float32: with TF32, batches of different sizes differ by a thousandth."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _length(projected: Tensor) -> Tensor:
    # The mean square of projections on standard normal directions is the squared norm, up to a factor of about 2.
    return projected.square().mean(1).sqrt()


def _rows_of(samples: Tree, size: int) -> _Rows:
    if not samples:
        return _Rows(torch.zeros(size, dtype=torch.float64), torch.zeros(size, NUM_DIRECTIONS, dtype=torch.float64))
    device = next(iter(samples.values())).device
    squares = torch.zeros(size, dtype=torch.float64, device=device)
    projected = torch.zeros(size, NUM_DIRECTIONS, dtype=torch.float64, device=device)
    for name in sorted(samples):
        flat = samples[name].reshape(size, -1)
        generator = torch.Generator().manual_seed(len(name) + 31 * flat.shape[1])
        for part in flat.split(CHUNK, dim=1):
            directions = torch.randn(part.shape[1], NUM_DIRECTIONS, generator=generator).to(part)
            squares += torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square()
            projected += part @ directions
    return _Rows(squares.sqrt().cpu(), projected.cpu())
