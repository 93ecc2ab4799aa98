"""The noisy sum of clipped gradients that a step of DP-SGD releases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fl.privacy.noise import PrivacyError, SecureNoise, add_noise, check_added
from lightning_fl.privacy.sample_level.per_sample import check_clipped_sum, clipped_sum
from lightning_fl.tree import Flat, Layout, add
from lightning_fl.types import Tree

NUM_COMPARED = 64
MIN_COMPARED = 16


class NoiseWatch:
    """Checks that noise never repeats from one step to the next, of any client. It keeps the last step's noise."""

    def __init__(self) -> None:
        self._last: Flat = {}
        self._last_fresh = torch.empty(0)

    def check(self, added: Flat, source: SecureNoise, std: float) -> None:
        """Compares the added noise with that of the last step.

        Args:
            added: Some of the noise, by dtype.
            source: The stream of the noise.
            std: Its standard deviation.

        Raises:
            PrivacyError: If they are equal.
        """
        # A broken generator can repeat in two ways: the stream restarts, or the noise on the gradient is reused.
        fresh = source.normal(MIN_COMPARED)
        repeats = torch.equal(fresh, self._last_fresh)
        for dtype, noise in added.items():
            last = self._last.get(dtype)
            if last is not None and last.shape == noise.shape and noise.numel() >= MIN_COMPARED:
                repeats |= bool(torch.allclose(noise, last, rtol=0.0, atol=1e-2 * std))
        self._last, self._last_fresh = added, fresh
        if repeats:
            raise PrivacyError("The noise repeats: two steps got the same noise. The run stops.")


class NoisySum:
    r"""The gradients of one client's steps: noisy sums of clipped gradients, divided by the expected batch size.

    .. math::
        \frac{1}{m} \Bigl(\sum_i g_i \min(1, C / \lVert g_i \rVert) + \mathcal{N}(0, z^2 C^2)\Bigr)

    Args:
        noise_multiplier: The noise :math:`z`.
        clip: The clip norm :math:`C`.
        expected: The expected number :math:`m` of gradients.
        watch: Checks that noise does not repeat.
        insecure_test_seed: A seed that makes the noise reproducible, for tests.
        purpose: Separates streams of the same test seed.
    """

    def __init__(
        self,
        noise_multiplier: float,
        clip: float,
        expected: float,
        watch: NoiseWatch,
        insecure_test_seed: int | None,
        *purpose: int | str,
    ) -> None:
        self.std = noise_multiplier * clip
        self.clip = clip
        self.expected = expected
        self._source = SecureNoise(insecure_test_seed, "examples", *purpose)
        self._watch = watch
        self._total: Tree = {}

    def add(self, samples: Tree, size: int) -> None:
        """Clips the gradients of some examples and adds them to the sum.

        Args:
            samples: Per-sample gradients by parameter, each of shape ``[size, ...]``.
            size: Number of examples.

        Raises:
            PrivacyError: If their sum is longer than ``size`` clip norms.
        """
        part = clipped_sum(samples, self.clip)
        check_clipped_sum(part, size, self.clip)
        known = {name: value for name, value in part.items() if name in self._total}
        self._total = {**self._total, **part, **add({name: self._total[name] for name in known}, known)}

    def release(self, params: Mapping[str, Tensor]) -> Tree:
        """Returns the gradient of a step, with fresh noise on all parameters, and resets the sum.

        Parameters without a gradient get noise too: whether one has a gradient depends on the examples.

        Raises:
            PrivacyError: If the noise is not what is recorded, or repeats.
        """
        total, self._total = self._total, {}
        tree = {
            name: total[name] if name in total else torch.zeros_like(param, dtype=_sum_dtype(param))
            for name, param in params.items()
        }
        layout = Layout.of({"gradient": tree})
        flat = layout.flatten({"gradient": tree})
        noisy = add_noise(flat, self.std, self._source)
        # On the released values, after rounding: noise that was lost by rounding protects nobody.
        check_added(flat, noisy, self.std)
        if self.std:
            # A few values are enough to detect a repetition; all of them would take the memory of another model.
            added = {dtype: (noisy[dtype] - flat[dtype])[:NUM_COMPARED] for dtype in flat}
            self._watch.check(added, self._source, self.std)
        released = layout.unflatten(noisy)["gradient"]
        return {name: (released[name] / self.expected).to(param.dtype) for name, param in params.items()}


def _sum_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)
