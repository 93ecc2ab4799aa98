"""Facts about loaders and batches."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def digest(batch: Any) -> str:
    """A digest of a batch's content."""
    content = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            content.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            content.update(repr(leaf).encode())
    return content.hexdigest()
