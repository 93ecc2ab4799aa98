"""Plain data inside the state of a transform, which holds tensors only."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from lightning_fl.privacy.accounting.ledger import Ledger
from lightning_fl.types import State


def load_ledger(state: State) -> Ledger:
    """The ledger in the state of the transform's server half; empty before the first round."""
    ledger = Ledger()
    if state:
        ledger.load_state_dict(unpack(state["ledger"]))
    return ledger


def pack(value: Any) -> Tensor:
    """Plain data as a tensor of bytes."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """What :func:`pack` was given."""
    return json.loads(packed.cpu().numpy().tobytes())
