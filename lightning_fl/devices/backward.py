"""Gradients of layers expressed in operations that ONNX has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fl import torch_internals

_aten = torch.ops.aten
_Maybe = Tensor | None


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The function that computes each operator from others."""
    # torch's ONNX exporter treats the second output of `nll_loss_forward` as the number of examples, which is wrong
    # with class weights, and supports none of the backward operators.
    found = torch_internals.decompositions([_aten.nll_loss_forward, _aten.nll_loss_backward])
    return {
        **found,
        _aten.convolution_backward.default: _convolution_backward,
        _aten.avg_pool2d_backward.default: _avg_pool2d_backward,
    }


def _missing(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """The number of elements by which a transposed convolution is smaller than the input."""
    return size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[_Maybe, _Maybe, _Maybe]:
    if transposed:
        raise NotImplementedError("a training step does not support transposed convolutions")
    dims = range(len(stride))
    of_x = of_weight = of_bias = None
    if wanted[0]:
        rest = [
            _missing(x.shape[2 + i], grad.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i])
            for i in dims
        ]
        of_x = _aten.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups)
    if wanted[1]:
        # Batch and channels are swapped, group by group, and so are stride and dilation.
        batch, channels, *size = x.shape
        grouped = x.reshape(batch, groups, channels // groups, *size).transpose(0, 2)
        turned = grouped.reshape(channels // groups, groups * batch, *size), grad.transpose(0, 1)
        nothing = [0] * len(stride)
        of_weight = _aten.convolution(*turned, None, dilation, padding, stride, False, nothing, groups).transpose(0, 1)
        for i in dims:
            of_weight = of_weight.narrow(2 + i, 0, weight.shape[2 + i])
    if wanted[2]:
        of_bias = grad.sum([0, *(2 + i for i in dims)])
    return of_x, of_weight, of_bias


def _avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    if x.dim() != 4 or ceil_mode or divisor or (any(padding) and not count_include_pad):
        raise NotImplementedError(
            "a training step supports average pooling of batches with torch's default settings only"
        )
    stride = stride or kernel
    batch, channels, *size = x.shape
    out = grad.shape[2:]
    share = torch.full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=grad.dtype)
    rest = [_missing(size[i], out[i], kernel[i], stride[i], padding[i], 1) for i in range(2)]
    alone = grad.reshape(batch * channels, 1, *out)  # each channel is pooled separately
    return _aten.convolution(alone, share, None, stride, padding, [1, 1], True, rest, 1).reshape(x.shape)
