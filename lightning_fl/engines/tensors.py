"""Which of a module's tensors are shared, which stay with their client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class FederatedTensors:
    """A module's tensors by their part in the federation, under their ``state_dict`` names; tied ones stand once.

    Args:
        params: Trainable shared parameters: they are averaged, and the algorithm sees them.
        buffers: Shared persistent buffers: they are averaged.
        personal: Parameters and buffers that never leave their client.
    """

    params: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    personal: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, personal: Sequence[str] = ()) -> FederatedTensors:
        """Sorts the tensors of ``module``.

        Args:
            module: The user's module.
            personal: ``fnmatch`` globs on ``state_dict`` names; a tied tensor answers to each of its names.

        Raises:
            ValueError: If a glob matches nothing, or nothing trainable is left to share.
        """
        persistent = set(module.state_dict())
        params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        trained: dict[str, Any] = {**params, **buffers}
        aliases = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        own: set[str] = set()
        for pattern in personal:
            matched = {id(tensor) for name, tensor in aliases if fnmatchcase(name, pattern)}
            names = {name for name, tensor in trained.items() if id(tensor) in matched}
            own |= names
            if not names:
                raise ValueError(
                    f"personal={pattern!r} matches none of the module's trainable parameters and persistent buffers; "
                    f"it has {', '.join(list(trained)[:8])}{', ...' if len(trained) > 8 else ''}."
                )
        shared = {name: param for name, param in params.items() if name not in own}
        if not shared:
            raise ValueError(
                "No trainable parameter is left to share: each is frozen or personal. Unfreeze some, or narrow "
                f"personal={list(personal)}."
            )
        return cls(
            params=shared,
            buffers={name: buffer for name, buffer in buffers.items() if name not in own},
            personal={name: trained[name].detach() for name in trained if name in own},
        )
