"""Checks, before the first round, that all ranks train the same module with the same settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fl.communication import Group, Message
from lightning_fl.torch_internals import pytree


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
    """Compares what the ranks are about to train; every rank raises the same error.

    Args:
        group: The ranks of the federation.
        module: This rank's module.
        settings: This rank's settings by name.
        versions: The versions of the libraries on which the results depend.
        columns: What the positions of features and classes mean on this rank, for data that says so.

    Raises:
        ValueError: If two ranks differ; the message names the first difference and the rank.
    """
    # Every rank compares all descriptions with the first, so that all of them raise: if only the rank that differs did,
    # the others would wait for it in the next collective.
    # Tensors come last: columns that differ show in their shapes too, but say less there.
    own = {
        "version": dict(versions),
        "data": dict(columns or {}),
        "setting": dict(settings),
        "tensor": describe_module(module),
    }
    first, *others = [message.fields for message in group.all_gather(Message(own), "handshake")]
    for rank, other in enumerate(others, start=1):
        for kind, expected in first.items():
            _compare(kind, expected, other.get(kind, {}), rank)


def synchronize_module(group: Group, module: nn.Module) -> None:
    """Broadcasts the module's tensors from rank 0 to all ranks."""
    with torch.no_grad():
        # Everything, not only what is averaged: frozen parameters and the common start of personal ones must agree too,
        # and no later step would make them equal.
        for tensor in module.state_dict().values():
            if isinstance(tensor, Tensor):
                tensor.copy_(group.broadcast(tensor))


def digest(batch: Any) -> bytes:
    """A digest of a batch's content, for comparisons by :func:`all_hold_the_same`; it must not leave the rank."""
    content = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            # Bytes instead of NumPy values, since NumPy has no bfloat16. Flat first, because a tensor without
            # dimensions can't be viewed in a dtype of another size.
            content.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            content.update(repr(leaf).encode())
    return content.digest()


def _compare(kind: str, expected: Mapping[str, Any], found: Mapping[str, Any], rank: int) -> None:
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"Rank {rank} and rank 0 do not train the same thing: {kind} {name!r} is "
                f"{found.get(name, 'missing')} on rank {rank} and {expected.get(name, 'missing')} on rank 0. Start "
                "all ranks with the same module, settings and versions."
            )
