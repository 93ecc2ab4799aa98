"""Federated fine-tuning of low-rank adapters: which factors are trained, and at which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_fl.algorithms.base import Algorithm, check_hyperparameter
from lightning_fl.tree import scalar_like
from lightning_fl.types import Context, State, Tree

DOWN, UP = "lora_A", "lora_B"


@dataclass(frozen=True)
class FFALoRA(Algorithm):
    r"""FFA-LoRA: the factor A of each adapter keeps its initial value, and only B is trained and averaged.

    A layer computes :math:`W x + s B A x`. With a common A, averaging the clients' B averages the products exactly:
    :math:`\sum_i p_i B_i A = \left( \sum_i p_i B_i \right) A`. Only B is sent.

    Args:
        server_lr: The server's learning rate. Default 1.

    Raises:
        ValueError: When training starts, if the module has no adapters.

    Reference:
        Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024.

    Example:
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy(fl.algorithms.FFALoRA())
    """

    server_lr: float = 1.0
    is_elementwise: ClassVar[bool] = True

    def prepare(self, module: nn.Module) -> None:
        for down in pairs(module):
            module.get_parameter(down).requires_grad_(False)


@dataclass(frozen=True)
class FedSBLoRA(Algorithm):
    r"""Fed-SB: an adapter is :math:`B R A` with fixed B and A, and only the small square R is trained and averaged.

    .. math:: W x + s B R A x, \qquad R \in \mathbb{R}^{r \times r}, \qquad \sum_i p_i B R_i A = B \bar R A

    The mean is exact, and :math:`r^2` numbers are sent per adapter, whatever the layer's size. A and B are set to the
    leading right and left singular vectors of the layer's weight, and R starts at 0, so that the model starts as the
    base model. The paper takes the singular vectors of a first gradient instead: for that, call
    :func:`square_adapters` with them before ``fit``.

    Args:
        server_lr: The server's learning rate. Default 1.

    Raises:
        ValueError: When training starts, if the module has no adapters, or the base weight of one is not found.

    Reference:
        Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
        Federated LoRA Fine-Tuning", 2025.
    """

    server_lr: float = 1.0
    is_elementwise: ClassVar[bool] = True

    def prepare(self, module: nn.Module) -> None:
        if not any(isinstance(part, _Square) for part in module.modules()):
            square_adapters(module)


@dataclass(frozen=True)
class HetLoRA(Algorithm):
    r"""Adapters of different ranks: client i trains the first :math:`r_i` rows of A and columns of B.

    The module's adapters have the largest rank. The rows and columns beyond a client's own rank are 0 while it trains,
    and count as 0 in the mean. With :class:`~lightning_fl.adapters.LoRAProduct` the products :math:`B_i A_i` are
    averaged and factored in the order of their singular values, so that a client of rank r starts from the best
    rank-r approximation.

    Args:
        ranks: The rank of each client, in the order of the sorted ids.
        server_lr: The server's learning rate. Default 1.

    Raises:
        ValueError: If ``ranks`` is empty or a rank is not a positive whole number; when training starts, if there are
            not as many ranks as clients, or the module has no adapters.

    Reference:
        Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024.

    Example:
        >>> import lightning_fl as fl
        >>> algorithm = fl.algorithms.HetLoRA(ranks=(4, 4, 16))
        >>> strategy = fl.FederatedStrategy(algorithm, aggregator=fl.adapters.LoRAProduct())
    """

    ranks: tuple[int, ...] = ()
    server_lr: float = 1.0
    knows_index: ClassVar[bool] = True
    adds_to_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))
        is_right = bool(self.ranks) and all(isinstance(rank, int) and rank > 0 for rank in self.ranks)
        check_hyperparameter(self, "ranks", is_right, "a positive whole number for each client")

    def server_init(self, params: Tree, population: int) -> State:
        if len(self.ranks) != population:
            raise ValueError(f"HetLoRA has ranks for {len(self.ranks)} clients, but the federation has {population}.")
        pairs_of(params)
        return super().server_init(params, population)

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        params: Tree = server["params"]
        rank = scalar_like(params, self.ranks[server["index"]])
        # The update is relative to the server's model, so that the part beyond the client's rank counts as 0.
        return {"params": _cut(params, rank), "rank": rank, "server": params}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return _cut(grads, ctx["rank"])

    def client_finish(self, params: Tree, ctx: Context, client: State | None, run: Any) -> Any:
        return super().client_finish(params, {**ctx, "params": ctx["server"]}, client, run)


def _cut(tensors: Tree, rank: Tensor) -> Tree:
    """Sets the rows of A and columns of B beyond a rank to 0."""
    found = {}
    for name, tensor in tensors.items():
        dim = 0 if DOWN in name else 1 if UP in name else None
        if dim is None:
            found[name] = tensor
            continue
        places = torch.arange(tensor.shape[dim], device=tensor.device)
        kept = (places < rank).view(-1, 1) if dim == 0 else (places < rank).view(1, -1)
        found[name] = torch.where(kept, tensor, torch.zeros_like(tensor))
    return found


def pairs_of(tensors: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Maps the name of each ``lora_A`` to that of its ``lora_B``.

    Raises:
        ValueError: If there are none, one has no partner, or their shapes don't match.
    """
    found = {name: name.replace(DOWN, UP) for name in tensors if DOWN in name}
    alone = sorted({name for name in tensors if UP in name}.symmetric_difference(found.values()))
    if alone or not found:
        found_instead = (
            f"only one half of the pair of {alone[0]} is trained" if alone else "the tensors contain no pair"
        )
        raise ValueError(
            f"Expected tensors lora_A and lora_B in pairs, but {found_instead}. Train both factors, leave them out of "
            "`personal`, or use an algorithm and an aggregator that need no adapters."
        )
    for down, up in found.items():
        if not (tensors[down].ndim == tensors[up].ndim == 2 and len(tensors[down]) == tensors[up].shape[1]):
            raise ValueError(
                f"Expected {down} of shape [r, in] and {up} of [out, r], found {list(tensors[down].shape)} and "
                f"{list(tensors[up].shape)}."
            )
    return found


def pairs(module: nn.Module) -> Mapping[str, str]:
    """The pairs of a module, as :func:`pairs_of`, including frozen parameters."""
    return pairs_of({name: own for name, own in module.named_parameters() if DOWN in name or UP in name})


def base_of(down: str, names: Sequence[str]) -> str:
    """The name of an adapter's base weight: ``base_layer.weight`` in peft, else ``weight`` of the same module.

    Raises:
        ValueError: If there is none.
    """
    prefix = down[: down.index(DOWN)]
    found = next((name for name in (f"{prefix}base_layer.weight", f"{prefix}weight") if name in names), None)
    if found is None:
        raise ValueError(
            f"The adapter {down} has no base weight: found neither {prefix}base_layer.weight nor {prefix}weight. Name "
            "the parameters as peft does."
        )
    return found


class _Square(nn.Module):
    """Parametrization that returns ``B R`` for a fixed ``B``."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.zeros(like.shape[1], like.shape[1], dtype=like.dtype, device=like.device))

    def forward(self, fixed: Tensor) -> Tensor:
        return fixed @ self.R


def square_adapters(module: nn.Module, bases: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
    """Turns each adapter ``B A`` of a module into ``B R A``, with B and A frozen and R trainable, initially 0.

    Args:
        module: The module, changed in place; each ``lora_B`` becomes a parametrization with the value ``B R``.
        bases: The fixed ``(B, A)`` of shapes ``[out, r]`` and ``[r, in]``, by the name of the ``lora_A``. Default
            None, and for adapters that it doesn't name: the leading singular vectors of the adapter's base weight.

    Raises:
        ValueError: If there are no adapters, or the base weight of one is not found.
    """
    params = dict(module.named_parameters())
    with torch.no_grad():
        for down, up in pairs(module).items():
            rank = len(params[down])
            if bases is not None and down in bases:
                fixed_up, fixed_down = bases[down]
            else:
                weight = params[base_of(down, list(params))]
                left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
                fixed_up, fixed_down = left[:, :rank], right[:rank]
            params[down].copy_(fixed_down)
            params[up].copy_(fixed_up)
    for down, up in pairs(module).items():
        owner, _, key = up.rpartition(".")
        for name in (down, up):
            params[name].requires_grad_(False)
        holder = module.get_submodule(owner)
        parametrize.register_parametrization(holder, key, _Square(params[up]))
