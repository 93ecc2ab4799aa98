"""Membership inference: training examples have smaller losses than others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_fl.engines.evaluation_mode import evaluating


def losses_of(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Callable[..., Tensor] = cross_entropy,
) -> Tensor:
    """The loss of each example, in evaluation mode.

    Args:
        module: The model, whose ``forward`` takes the inputs.
        batches: Pairs ``(x, y)``, such as a DataLoader.
        loss: Takes outputs, targets and ``reduction="none"``. Default: cross-entropy.

    Returns:
        The losses ``[examples]`` on the CPU.
    """
    with evaluating(module), torch.no_grad():
        return torch.cat([loss(module(x), y, reduction="none").detach().cpu() for x, y in batches])


def membership_auc(members: Tensor, others: Tensor) -> float:
    r"""How well losses distinguish training examples from others: the area under the ROC curve.

    .. math::
        \mathrm{AUC} = \Pr[\ell_\text{member} < \ell_\text{other}] + \tfrac{1}{2} \Pr[\ell_\text{member} =
        \ell_\text{other}]

    1/2 means that the losses reveal nothing, 1 that they reveal every member. A low value is no proof of privacy:
    attacks that train shadow models find more.

    Args:
        members: The losses of training examples, ``[n]``.
        others: The losses of examples of the same kind that were not trained on, ``[m]``.

    Raises:
        ValueError: If one of them is empty or holds NaN.

    Reference:
        Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", CSF 2018.
    """
    if not len(members) or not len(others) or members.isnan().any() or others.isnan().any():
        raise ValueError(
            f"Got losses of {len(members)} members and {len(others)} others; expected some of both, without NaN."
        )
    # Ranks by sorting, since a table of all pairs would need n x m numbers.
    ordered = others.double().sort().values
    values = members.double()
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    wins = (len(ordered) - upto).double() + 0.5 * (upto - below).double()
    return float(wins.mean()) / len(ordered)
