"""A silo's own rules: what it refuses, whatever the coordinator asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_fl.yaml_files import read_yaml

PROTECTIONS = ("differential privacy", "secure aggregation")


class PolicyBroken(RuntimeError):
    """The federation asks for something that the silo's policy forbids."""


@dataclass(frozen=True)
class Policy:
    """What a silo allows, according to its file ``policy.yaml``; omitted entries allow everything.

    Args:
        algorithms: Class names of the algorithms that it takes part in, such as ``FedAvg``.
        start: SHA-256 of the initial model.
        min_cohort: Minimum number of updates in a round to which it sends its own.
        max_rounds: Maximum number of updates that it sends, one per round; an update that is trained again after a
            crash counts again.
        require: ``"differential privacy"``, ``"secure aggregation"`` or a list of both: the silo only takes part in
            runs that have it.
        silos: The silos with which it trains.
        questions: The names of the questions that it answers, such as ``Mean``.
        min_count: Minimum number of rows behind an answer.
    """

    algorithms: Sequence[str] | None = None
    start: str | None = None
    min_cohort: int = 1
    max_rounds: int | None = None
    require: str | Sequence[str] | None = None
    silos: Sequence[str] | None = None
    questions: Sequence[str] | None = None
    min_count: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.required if name not in PROTECTIONS]
        if unknown:
            raise ValueError(f"policy.yaml has require={self.require!r}; expected {', '.join(PROTECTIONS)} or nothing.")

    @property
    def required(self) -> Sequence[str]:
        """The protections that the silo requires."""
        return [self.require] if isinstance(self.require, str) else self.require or []

    def check_algorithm(self, algorithm: str, protections: Collection[str]) -> None:
        """Checks that the silo may take part in a run.

        Args:
            algorithm: The algorithm, as ``Name(...)``.
            protections: The run's protections, of :data:`PROTECTIONS`.

        Raises:
            PolicyBroken: If it may not.
        """
        name = algorithm.partition("(")[0]
        if self.algorithms is not None and name not in self.algorithms:
            raise PolicyBroken(f"The algorithm is {name}; policy.yaml allows {', '.join(self.algorithms)}.")
        for name in self.required:
            if name not in protections:
                raise PolicyBroken(f"policy.yaml requires {name}, but this run trains without it.")

    def check_questions(self, questions: Sequence[str], min_count: int, protections: Collection[str]) -> None:
        """Checks that the silo may answer questions.

        Args:
            questions: The names of the questions.
            min_count: Minimum number of rows behind an answer.
            protections: The run's protections, of :data:`PROTECTIONS`.

        Raises:
            PolicyBroken: If it may not.
        """
        for name in questions:
            if self.questions is not None and name not in self.questions:
                raise PolicyBroken(f"The question is {name}; policy.yaml allows {', '.join(self.questions)}.")
        if self.min_count is not None and min_count < self.min_count:
            raise PolicyBroken(f"Answers may rest on {min_count} rows; policy.yaml has min_count: {self.min_count}.")
        for name in self.required:
            if name not in protections:
                raise PolicyBroken(f"policy.yaml requires {name}, but these questions are asked without it.")

    def check_silos(self, silos: Sequence[str]) -> None:
        """Checks that the policy names all silos of the federation.

        Raises:
            PolicyBroken: If it does not.
        """
        strangers = [] if self.silos is None else [silo for silo in silos if silo not in self.silos]
        if strangers:
            raise PolicyBroken(f"policy.yaml does not name the silos {', '.join(strangers)}.")

    def check_start(self, start: str) -> None:
        """Checks that the federation starts from the model that the policy names.

        Raises:
            PolicyBroken: If it does not.
        """
        if self.start is not None and start != self.start:
            raise PolicyBroken(f"The federation starts from the model {start}; policy.yaml has start: {self.start}.")

    def check_rounds(self, num_sent: int) -> None:
        """Checks that the silo may send another update.

        Args:
            num_sent: Number of updates that it has sent so far, accepted or not.

        Raises:
            PolicyBroken: If it may not.
        """
        if self.max_rounds is not None and num_sent >= self.max_rounds:
            raise PolicyBroken(f"This silo has sent {num_sent} update(s), all that policy.yaml allows.")

    def check_cohort(self, cohort: Sequence[str], fewest: int | None = None) -> None:
        """Checks that a round has enough silos.

        Args:
            cohort: The silos that train.
            fewest: Number of updates with which the round may close. None: those of the whole cohort.

        Raises:
            PolicyBroken: If it has too few.
        """
        if len(cohort) < self.min_cohort:
            raise PolicyBroken(f"A round has {len(cohort)} silos; policy.yaml has min_cohort: {self.min_cohort}.")
        if fewest is not None and fewest < self.min_cohort:
            raise PolicyBroken(
                f"A round may close with {fewest} update(s); policy.yaml has min_cohort: {self.min_cohort}. The "
                "federation needs min_silos of at least that."
            )


def read_policy(path: Path) -> Policy:
    """Reads ``policy.yaml``; without a file everything is allowed.

    Raises:
        ValueError: If an entry is unknown or of the wrong kind.
    """
    if not path.exists():
        return Policy()
    content = read_yaml(path)
    known = {field.name for field in fields(Policy)}
    if not isinstance(content, Mapping) or not content.keys() <= known:
        raise ValueError(f"{path} holds something else than the entries {', '.join(sorted(known))}.")
    for name in ("min_cohort", "max_rounds", "min_count"):
        value = content.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path} has {name}={value!r}; expected a whole number, at least 1.")
    for name in ("algorithms", "silos", "questions"):
        names: Any = content.get(name, [])
        if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
            raise ValueError(f"{path} has {name}={names!r}; expected a list of names.")
    return Policy(**content)
