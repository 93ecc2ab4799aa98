"""A silo's own rules: what it refuses, whatever the coordinator says."""

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
    """What a silo allows, as its file ``policy.yaml`` says; what is left out is allowed.

    Args:
        algorithms: The names of the algorithms' classes that it takes part in, such as ``FedAvg``.
        start: SHA-256 of the model from which all begin.
        min_cohort: The fewest silos with whose updates a round may close in which it sends its own.
        max_rounds: The updates that it sends at most, one a round; one that is trained again after a crash is another.
        require: ``"differential privacy"``, ``"secure aggregation"`` or a list of both: only in runs that have it.
        silos: The silos with which it trains.
        questions: The names of the questions that it answers, such as ``Mean``.
        min_count: The fewest rows that an answer must rest on.
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
        """What must protect the silo."""
        return [self.require] if isinstance(self.require, str) else self.require or []

    def check_algorithm(self, algorithm: str, protections: Collection[str]) -> None:
        """Makes sure that the silo trains what it may.

        Args:
            algorithm: The algorithm, as ``Name(...)``.
            protections: What protects the silo, of :data:`PROTECTIONS`.

        Raises:
            PolicyBroken: If it does not.
        """
        name = algorithm.partition("(")[0]
        if self.algorithms is not None and name not in self.algorithms:
            raise PolicyBroken(f"The algorithm is {name}; policy.yaml allows {', '.join(self.algorithms)}.")
        for name in self.required:
            if name not in protections:
                raise PolicyBroken(f"policy.yaml requires {name}, but this run trains without it.")

    def check_questions(self, questions: Sequence[str], min_count: int, protections: Collection[str]) -> None:
        """Makes sure that the silo answers what it may.

        Args:
            questions: The names of the questions.
            min_count: The fewest rows that an answer rests on.
            protections: What protects the silo, of :data:`PROTECTIONS`.

        Raises:
            PolicyBroken: If it does not.
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
        """Makes sure that the policy names all silos of the federation.

        Raises:
            PolicyBroken: If it does not.
        """
        strangers = [] if self.silos is None else [silo for silo in silos if silo not in self.silos]
        if strangers:
            raise PolicyBroken(f"policy.yaml does not name the silos {', '.join(strangers)}.")

    def check_start(self, start: str) -> None:
        """Makes sure that the federation starts from the model that the policy names.

        Raises:
            PolicyBroken: If it does not.
        """
        if self.start is not None and start != self.start:
            raise PolicyBroken(f"The federation starts from the model {start}; policy.yaml has start: {self.start}.")

    def check_rounds(self, num_sent: int) -> None:
        """Makes sure that the silo may send another update.

        Args:
            num_sent: The updates that it has sent so far, whatever has become of them.

        Raises:
            PolicyBroken: If it may not.
        """
        if self.max_rounds is not None and num_sent >= self.max_rounds:
            raise PolicyBroken(f"This silo has sent {num_sent} update(s), all that policy.yaml allows.")

    def check_cohort(self, cohort: Sequence[str], fewest: int | None = None) -> None:
        """Makes sure that a round has enough silos.

        Args:
            cohort: Those that train.
            fewest: With how many updates the round may close. None: with those of the whole cohort.

        Raises:
            PolicyBroken: If it has not.
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
