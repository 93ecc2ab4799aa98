"""Plain data in a transform's state, which may hold only tensors, so that checkpoints load with weights_only=True."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from lightning_fl.privacy.accounting.ledger import Ledger
from lightning_fl.types import State


def load_ledger(state: State) -> Ledger:
    """Returns the ledger in the state of a transform's server half; empty before the first round."""
    ledger = Ledger()
    if state:
        ledger.load_state_dict(unpack(state["ledger"]))
    return ledger


def pack(value: Any) -> Tensor:
    """Encodes plain data as a tensor of bytes."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """Decodes what :func:`pack` returned."""
    return json.loads(packed.cpu().numpy().tobytes())
