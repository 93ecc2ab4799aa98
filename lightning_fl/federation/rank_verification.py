"""Checks, before the first round, that all ranks train the same module with the same settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fl.communication import Group, Message
from lightning_fl.engines.spread import local
from lightning_fl.federation.agreement import Disagreement, differences, several
from lightning_fl.torch_internals import pytree
from lightning_fl.tree import num_bytes


def describe_module(module: nn.Module) -> dict[str, str]:
    """Name, shape and dtype of each tensor in the module's ``state_dict``."""
    return {
        name: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def verify_ranks(
    group: Group,
    module: nn.Module,
    settings: Mapping[str, str],
    versions: Mapping[str, str],
    columns: Mapping[str, str] | None = None,
) -> None:
    """Compares the ranks' modules, settings and versions; every rank raises the same error.

    Args:
        group: The ranks of the federation.
        module: This rank's module.
        settings: This rank's settings by name.
        versions: The versions of the libraries on which the results depend.
        columns: The meaning of the positions of features and classes on this rank, if its data specifies it.

    Raises:
        ValueError: If two ranks differ; the message names the differences and the rank.
    """
    # Every rank compares all descriptions with the first, so that all of them raise: if only the rank that differs did,
    # the others would wait for it in the next collective.
    # Tensors come last: differing columns also show in their shapes, but less clearly.
    own = {
        "version": dict(versions),
        "data": dict(columns or {}),
        "setting": dict(settings),
        "tensor": describe_module(module),
    }
    first, *others = [message.fields for message in group.all_gather(Message(own), "handshake")]
    for rank, other in enumerate(others, start=1):
        who, reference = group.who(rank), group.who(0)
        found = [
            f"{kind} {phrase}"
            for kind, expected in first.items()
            for phrase in differences(expected, other.get(kind, {}), who, reference)
        ]
        if found:
            raise Disagreement(
                f"{who.capitalize()} and {reference} do not train the same thing: {several(found)}. Start all ranks "
                "with the same module, settings and versions."
            )


def synchronize_module(group: Group, module: nn.Module, broadcast_frozen: bool = False) -> int:
    """Broadcasts the module's tensors from rank 0 to all ranks, and compares the frozen parameters.

    Args:
        group: The ranks of the federation.
        module: This rank's module.
        broadcast_frozen: Whether frozen parameters are broadcast too. If not, their digests are compared: they may be
            most of a large model, and a silo may have loaded different ones on purpose.

    Returns:
        Bytes of the frozen parameters that were broadcast.

    Raises:
        ValueError: On every rank, if a frozen parameter differs.
    """
    frozen = frozen_parameters(module)
    if not broadcast_frozen:
        digests = {name: digest(own).hex() for name, own in frozen.items()}
        if group.shards.size > 1:  # of all parts of each
            parts = [message.fields for message in group.shards.all_gather(Message(digests), "frozen parts")]
            digests = {name: "".join(part[name] for part in parts) for name in digests}
        first, *others = [message.fields for message in group.all_gather(Message(digests), "frozen parameters")]
        for rank, other in enumerate(others, start=1):
            different = next((name for name in first if other.get(name) != first[name]), None)
            if different is not None:
                raise ValueError(
                    f"The frozen parameter {different!r} of {group.who(rank)} has other values than that of "
                    f"{group.who(0)}. Load the "
                    "same base on all ranks, call lightning.seed_everything if it is drawn at random, or let rank 0 "
                    'send its own with FederatedStrategy(frozen="broadcast").'
                )
    num_sent = 0
    with torch.no_grad():
        # Everything else, not only the averaged tensors: the initial values of personal ones must agree too, and no
        # later step would make them equal.
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, Tensor) and (broadcast_frozen or name not in frozen):
                own = local(tensor)
                if group.is_spread and own is tensor:  # otherwise only the same process of each silo would receive it
                    own.copy_(group.inner.broadcast(own))
                own.copy_(group.broadcast(own))
                num_sent += num_bytes([tensor]) if name in frozen else 0
    return num_sent


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not trained, under each of their names."""
    return {name: own for name, own in module.named_parameters(remove_duplicate=False) if not own.requires_grad}


def digest(batch: Any) -> bytes:
    """A digest of the content of a batch or a tensor.

    It would confirm a guess of the content, so digests of data are only compared, by :func:`all_hold_the_same`.
    """
    content = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            # Bytes instead of NumPy values, since NumPy has no bfloat16. Flat first, because a tensor without
            # dimensions can't be viewed in a dtype of another size.
            content.update(local(leaf).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            content.update(repr(leaf).encode())
    return content.digest()
