"""Creates a model card from a checkpoint, without information about single clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_fl.strategies.checkpoint import KEY

_HEAD = """---
library_name: pytorch-lightning
tags:
- federated-learning
- lightning-fl
---

# {name}

"""


def model_card(checkpoint: Mapping[str, Any], module: L.LightningModule, is_personal: bool = False) -> str:
    """The text of a model card, in the hub's Markdown.

    Args:
        checkpoint: The content of the checkpoint.
        module: The module.
        is_personal: Whether it is the personalised model of one client.
    """
    name = type(module).__name__
    rows = [("class", f"`{type(module).__module__}.{name}`")]
    rows.append(("parameters", f"{sum(one.numel() for one in module.parameters()):,}"))
    federated = checkpoint.get(KEY)
    if federated is None:
        lines = ["Trained centrally with Lightning."]
    else:
        history = federated["history"]
        lines = [f"Trained by federated learning with `{federated['algorithm']}`."]
        rows.append(("rounds", f"{len(history):,}"))
        if history and "fl/dp_epsilon" not in federated["metrics"]:  # which the size of the cohort would weaken
            rows.append(("clients in the last round", f"{history[-1]['num_clients']:,}"))
        metrics = {key: float(value) for key, value in federated["metrics"].items() if isinstance(value, Tensor)}
        for key, unit in (("dp", ""), ("dp_example", " of examples")):
            if f"fl/{key}_epsilon" in metrics:
                rows.append((f"differential privacy{unit}", f"epsilon {metrics[f'fl/{key}_epsilon']:.4g}"))
        hidden = ("fl/", "round/")
        own = {
            key: value
            for key, value in metrics.items()
            if not key.startswith(hidden) and key not in federated["client_metrics"]
        }
        # Metrics that clients log in training are about clients; use only those of the global model.
        rows += [(key, f"{value:.4g}") for key, value in sorted(own.items())]
    if is_personal:
        lines.append("It is the personalised model of one client: do not share it with anybody else.")
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    use = [
        "## Use",
        "",
        "```python",
        "from safetensors.torch import load_file",
        "",
        f"module = {name}(...)  # the hyper-parameters are in config.json",
        'module.load_state_dict(load_file("model.safetensors"))',
        "```",
    ]
    return _HEAD.format(name=name) + "\n".join([*lines, "", *table, "", *use]) + "\n"
