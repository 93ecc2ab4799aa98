"""YAML files of users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not YAML; the message names the line.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        if mark is None:
            raise ValueError(f"{path} is not YAML: {error.problem}.") from error
        line = text.splitlines()[mark.line : mark.line + 1]
        shown = f" in {line[0].strip()!r}" if line else ""
        raise ValueError(
            f"{path} is not YAML: line {mark.line + 1}{shown}: {error.problem}. Entries of one part begin in the same "
            "column, with spaces and no tabs; a name is followed by a colon and a space."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
