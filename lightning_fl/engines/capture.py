"""Captures a function of tensors once and replays it: a CUDA graph on a GPU, recorded operations on other devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_fl.torch_internals import copy_tensors, record_operations

NUM_WARM_UPS = 3
"""Runs before a CUDA graph is captured: libraries allocate and choose kernels in the first ones."""
Function = Callable[[], list[Tensor]]
"""Takes no arguments: reads and writes tensors that it knows, and returns new ones."""


class CapturedFunction(ABC):
    """A function that has been captured; a replay repeats its tensor operations, not its Python code.

    Args:
        inputs: The tensors that it reads and writes; their memory is the same in each replay.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Replays the function on other values.

        Args:
            values: One tensor for each of ``inputs``, into which they are copied.

        Returns:
            What the function returned; the next replay of any function with the same pool may overwrite it.
        """
        if len(values) != len(self.inputs):
            raise ValueError(f"got {len(values)} tensors; expected {len(self.inputs)}")
        copy_tensors(self.inputs, values)
        return self._replay()

    @abstractmethod
    def _replay(self) -> list[Tensor]: ...


class CudaGraph(CapturedFunction):
    """One launch replays all kernels; they draw from the default generator as in the function itself."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], pool: Any) -> None:
        super().__init__(inputs)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(NUM_WARM_UPS):
                function()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = function()

    def _replay(self) -> list[Tensor]:
        self._graph.replay()
        return self._outputs


class RecordedFunction(CapturedFunction):
    """The function's operations one after the other; no faster, but it tests on a CPU what a CUDA graph would do."""

    def __init__(self, function: Function, tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self._operations = record_operations(function, tensors)

    @torch.no_grad()
    def _replay(self) -> list[Tensor]:
        return list(self._operations(*self.inputs))


def capture(function: Function, tensors: Sequence[Tensor], pool: Any = None) -> CapturedFunction:
    """Captures a function; the values of ``tensors`` and the random state are the same afterwards as before.

    Args:
        function: Is called several times.
        tensors: The tensors whose values may differ from replay to replay; all others that it reads are read from where
            they are.
        pool: From ``torch.cuda.graph_pool_handle()``: functions with the same pool share memory. Default None.

    Raises:
        RuntimeError: If it does something that can't be replayed, such as branching on a tensor's values.
    """
    device = tensors[0].device
    with separate(tensors) as inputs, unchanged_randomness(device):
        if device.type == "cuda":
            return CudaGraph(function, inputs, pool)
        return RecordedFunction(function, tensors, inputs)


@contextmanager
def separate(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """A block in which the tensors have separate memory, so that writes to them are undone at its end.

    Yields:
        Tensors that share this memory, also after the block.
    """
    own = [tensor.data for tensor in tensors]
    copies = [value.clone() for value in own]
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.data = copy
    try:
        yield copies
    finally:
        # Backwards, because a tensor may be given twice.
        for tensor, value in reversed([*zip(tensors, own, strict=True)]):
            tensor.data = value


def unchanged_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Restores the default generators of the CPU and of ``device`` at the end of the block."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def slack(device: torch.device) -> int:
    """Factor by which rounding errors on a device exceed those on a CPU.

    A GPU adds in another order, and cuDNN may transform convolutions, so more than the last digits can differ.
    """
    return 1 if device.type == "cpu" else 10


def tolerances(expected: Tensor, largest: float) -> tuple[float, float]:
    """The ``rtol`` and ``atol`` within which the results of two ways of computing a tensor count as equal.

    Args:
        expected: The tensor; its dtype and device determine the tolerances.
        largest: Absolute value of the largest of the terms that were added up. An element near 0 carries the rounding
            errors of the large terms that have cancelled in it.
    """
    eps = slack(expected.device) * torch.finfo(expected.dtype).eps
    return 1e3 * eps, 100 * eps * largest


def agree(found: Tensor, expected: Tensor, before: Tensor | None = None) -> bool:
    """Whether two ways of computing a tensor agree up to rounding; NaN equals NaN.

    Args:
        found: The tensor to check.
        expected: The correct tensor.
        before: The tensor from which both started, if it was updated: then the changes are compared, whose last digits
            can be lost in the updated values.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not found.is_floating_point() or torch.equal(found, expected):
        return torch.equal(found, expected)
    rounding = 0.0
    if before is not None:
        rounding = 2 * torch.finfo(found.dtype).eps * _largest(before)
        found, expected = found - before, expected - before
    rtol, atol = tolerances(expected, _largest(expected))
    return torch.allclose(found, expected, rtol=rtol, atol=atol + rounding, equal_nan=True)


def _largest(tensor: Tensor) -> float:
    # With a NaN the tolerance would be NaN, and tensors that agree, NaN for NaN, would count as different.
    return float(tensor.nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0
