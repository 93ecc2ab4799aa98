"""The privacy that answers about the same rows have cost so far, over all questions and calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_fl.files import write_whole
from lightning_fl.os_differences import flush_folder
from lightning_fl.privacy.accounting.ledger import Gaussian, Ledger

FORMAT = 1


@dataclass
class Spent:
    """The privacy cost of earlier questions about the same rows, and how they divided the rows.

    Args:
        releases: The released sums; those without noise have a noise multiplier of 0.
        own: Epsilon and delta of each question that is private by itself.
        cuts: The values or edges by which each column was divided.
        path: The file of this record. None: it is not saved.
    """

    releases: Ledger = field(default_factory=Ledger)
    own: list[tuple[float, float]] = field(default_factory=list)
    cuts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    path: Path | None = None
    _content: str | None = None

    @classmethod
    def of(cls, ledger: Ledger | str | Path | None) -> Spent:
        """Reads a ledger, or a file, which need not exist yet.

        Raises:
            ValueError: If the file has another format.
        """
        if isinstance(ledger, Ledger) or ledger is None:
            return cls((ledger or Ledger()) + Ledger())
        path, found = Path(ledger), cls(path=Path(ledger))
        if path.exists():
            try:
                found._content = path.read_text(encoding="utf-8")
                content = json.loads(found._content)
                if content["format"] != FORMAT:
                    raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
                found.releases.load_state_dict(content["releases"])
                found.own = [(float(epsilon), float(delta)) for epsilon, delta in content["own"]]
                found.cuts = {str(name): tuple(map(str, values)) for name, values in content["cuts"].items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is not a ledger of questions: {error}. Name another file.") from error
        return found

    def save(self) -> None:
        """Writes the file atomically.

        Raises:
            ValueError: If another analysis has written it meanwhile, because its releases would be lost.
        """
        if self.path is None:
            return
        if (self.path.read_text(encoding="utf-8") if self.path.exists() else None) != self._content:
            raise ValueError(f"{self.path} was written by another analysis meanwhile. Ask again.")
        content = {
            "format": FORMAT,
            "releases": self.releases.state_dict(),
            "own": self.own,
            "cuts": {name: list(values) for name, values in self.cuts.items()},
        }
        self._content = json.dumps(content, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, self._content.encode(), mode=0o666)
        flush_folder(self.path.parent)  # what was spent must not be forgotten once the answer is known

    def divide(self, cuts: Mapping[str, tuple[Any, ...]]) -> None:
        """Records how a question divides columns.

        Raises:
            ValueError: If a column was divided differently before, since the difference may reveal a few rows.
        """
        for column, values in cuts.items():
            found = tuple(map(str, values))
            before = self.cuts.setdefault(column, found)
            if set(before) != set(found):
                raise ValueError(
                    f"Two questions divide the column {column!r} in different ways, {before[:5]} and {found[:5]}; "
                    "the difference of their answers could reveal a few rows. Divide it in one way only."
                )

    def record(self, event: Gaussian, count: int, writes: bool = True) -> None:
        """Records releases, before they are made.

        Args:
            event: The release.
            count: Number of such releases.
            writes: Whether this process writes the file.
        """
        if count:
            self.releases.record(event, count)
        if writes:
            self.save()

    def epsilon(self, delta: float) -> tuple[float, float]:
        """Epsilon and delta of all releases and questions; infinite if a sum was released without noise.

        Args:
            delta: The delta at which epsilon is computed for the releases.
        """
        noise = float(self.releases.epsilon(delta)) if list(self.releases) else 0.0
        return noise + sum(epsilon for epsilon, _ in self.own), delta + sum(own for _, own in self.own)
