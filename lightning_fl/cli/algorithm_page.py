"""The page that is printed about one algorithm: its documentation, and how to select it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_fl.cli.maths_text import readable


def page(name: str, class_name: str, documentation: str, settings: Mapping[str, object]) -> str:
    """An algorithm's page.

    Args:
        name: The name under which it is registered.
        class_name: The name of its class.
        documentation: Its docstring.
        settings: The default of each hyper-parameter, by name.
    """
    lines = [
        f"{readable(documentation)}\n",
        f"On the command line: lightning-fl fit --config config.yaml --trainer.strategy {name.lower()}\n",
        "In YAML:\n\ntrainer:\n  strategy:\n    class_path: lightning_fl.FederatedStrategy\n    init_args:",
        f"      algorithm:\n        class_path: {class_name}",
        *(["        init_args:"] if settings else []),
        *(f"          {key}: {'null' if value is None else value}" for key, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"
