"""Reconstructs examples from gradients: exactly for a linear layer, by optimisation for any network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_fl.types import Tree

Loss = Callable[[Tensor, Tensor], Tensor]


def gradients_of(module: nn.Module, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tree:
    """The gradients of a batch, which a client would send after one step of SGD.

    Args:
        module: The model.
        x: The inputs ``[batch, ...]``.
        y: The targets ``[batch]``.
        loss: The loss of outputs and targets. Default: cross-entropy.
    """
    named = {name: param for name, param in module.named_parameters() if param.requires_grad}
    found = torch.autograd.grad(loss(module(x), y), list(named.values()))
    return dict(zip(named, found, strict=True))


def gradients_of_update(delta: Mapping[str, Tensor], lr: float) -> Tree:
    r"""The gradients :math:`-\Delta / \eta` of an update of one SGD step; of several steps, roughly their sum.

    Args:
        delta: The update, such as ``update.delta`` in :meth:`FederatedCallback.on_client_end`.
        lr: The client's learning rate :math:`\eta`.

    Raises:
        ValueError: If ``lr`` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr={lr} must be positive, the learning rate of the client's SGD.")
    return {name: -tensor / lr for name, tensor in delta.items()}


def label_of(bias_gradient: Tensor) -> int:
    r"""The class of a single example, from the gradient of the last layer's bias: the only negative entry.

    .. math::
        \frac{\partial \ell}{\partial b_k} = p_k - [k = y]

    Args:
        bias_gradient: The gradient ``[classes]`` of a cross-entropy.

    Raises:
        ValueError: If the number of negative entries is not one, so it is not the gradient of one example.

    Reference:
        Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020.
    """
    negative = (bias_gradient < 0).nonzero()[:, 0].tolist()
    if len(negative) != 1:
        raise ValueError(
            f"{len(negative)} entries of the gradient are negative; expected one, as for a single example's "
            "cross-entropy. Give the gradient of the last layer's bias for a single example."
        )
    return int(negative[0])


def invert_linear(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    r"""The input of a linear layer with bias for a single example, exactly.

    .. math::
        x = \frac{\partial \ell}{\partial W_k} \Big/ \frac{\partial \ell}{\partial b_k}

    for the row :math:`k` with the largest bias gradient. For a batch, the result is a mixture of the inputs.

    Args:
        weight_gradient: The gradient of the weights ``[outputs, inputs]``.
        bias_gradient: The gradient of the bias ``[outputs]``.

    Raises:
        ValueError: If the gradient of the bias is zero, as if no unit of a ReLU layer is active.

    Reference:
        Phong et al., "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", IEEE TIFS 2018.
    """
    row = int(bias_gradient.abs().argmax())
    if not bias_gradient[row].abs() > 0:
        raise ValueError("The bias has a gradient of zero, so the weights' gradient does not reveal the input.")
    return weight_gradient[row] / bias_gradient[row]


def invert_gradients(
    module: nn.Module,
    gradients: Mapping[str, Tensor],
    shape: Sequence[int],
    labels: Tensor,
    loss: Loss = cross_entropy,
    match: Literal["euclidean", "cosine"] = "euclidean",
    total_variation: float = 0.0,
    iterations: int = 300,
    seed: int = 0,
) -> Tensor:
    r"""Searches for inputs with the given gradients, by L-BFGS from random ones.

    .. math::
        \min_x \sum_k \lVert g_k(x) - g_k \rVert^2 \quad \text{or} \quad
        \min_x \; 1 - \frac{\langle g(x), g \rangle}{\lVert g(x) \rVert \lVert g \rVert} + \lambda \, \mathrm{TV}(x)

    The first is "deep leakage from gradients" (DLG), the second "inverting gradients". It needs a network with second
    derivatives, for example with sigmoid or GELU; with ReLU it often fails, which does not prove privacy.

    Args:
        module: The model from which the client started; it is not changed.
        gradients: The gradients by parameter name, as returned by :func:`gradients_of` and
            :func:`gradients_of_update`.
        shape: The shape of the batch of inputs ``[batch, ...]``.
        labels: Their targets ``[batch]``; for one example, :func:`label_of` finds it.
        loss: The client's loss. Default: cross-entropy.
        match: The distance between gradients, ``"euclidean"`` or ``"cosine"``. Default ``"euclidean"``.
        total_variation: The weight :math:`\lambda` of differences between neighbouring pixels, which applies to both
            distances. Default 0.
        iterations: Maximum number of steps. Default 300.
        seed: Seed of the initial inputs. Default 0.

    Returns:
        The inputs found, of the given shape.

    Raises:
        ValueError: If ``match`` is not known, or ``gradients`` names a tensor that is not a parameter of the module.

    Reference:
        Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019; Geiping et al., "Inverting Gradients - How easy is it
        to break privacy in federated learning?", NeurIPS 2020.
    """
    if match not in ("euclidean", "cosine"):
        raise ValueError(f"match={match!r} is not known; expected 'euclidean' or 'cosine'.")
    params = {name: param for name, param in module.named_parameters() if name in gradients}
    if params.keys() != gradients.keys():
        missing = sorted(gradients.keys() - params.keys())
        raise ValueError(f"The gradients name {missing[0]!r}, which is not a parameter of the module.")
    wanted = [gradients[name].detach() for name in params]
    like = next(iter(params.values()))
    start = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = start.to(like.device, like.dtype).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=iterations,
        history_size=100,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def distance() -> Tensor:
        found = torch.autograd.grad(loss(module(x), labels), list(params.values()), create_graph=True)
        if match == "euclidean":
            return sum(((a - b).square().sum() for a, b in zip(found, wanted, strict=True)), start=x.new_zeros(()))
        own, target = (torch.cat([part.reshape(-1) for part in parts]) for parts in (found, wanted))
        return 1 - own @ target / (own.norm() * target.norm())

    def closure() -> Tensor:
        total = distance()
        if total_variation:
            total = total + total_variation * sum(
                (x.diff(dim=dim).abs().mean() for dim in range(2, x.dim())), start=x.new_zeros(())
            )
        # `autograd.grad` instead of `backward`, so that the module's own gradients are unchanged.
        (x.grad,) = torch.autograd.grad(total, [x])
        return total.detach()

    optimizer.step(closure)
    return x.detach()


def psnr(found: Tensor, truth: Tensor, peak: float = 1.0) -> float:
    r"""The peak signal-to-noise ratio :math:`10 \log_{10}(\text{peak}^2 / \text{mean squared error})` in dB.

    Args:
        found: The reconstruction.
        truth: The original, of the same shape.
        peak: The largest value of an input. Default 1.
    """
    error = float((found - truth).double().square().mean())
    return math.inf if not error else 10 * math.log10(peak**2 / error)
