"""Who may train now: conditions, quotas, and tasks that are signed instead of remembered."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lightning_fl.coordinator.refused import Refused

DAY_S = 86_400.0
MINUTE_S = 60.0
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class AdmissionRules:
    """Who may train when.

    Args:
        conditions: What a device has to say of itself, such as ``("charging", "unmetered")``. It may lie.
        updates_per_day: Updates that are taken of a device in 24 hours. None: any number.
        requests_per_minute: Requests that a device may make in a minute.
        task_s: How long a task is good for, in seconds.
        max_examples: The most examples that a device may claim, which is its weight. Default 10,000.
        max_norm: The largest L2 norm of an update's change. Default 1e9, which only keeps sums finite.

    Raises:
        ValueError: If a number is not positive.
    """

    conditions: tuple[str, ...] = ()
    updates_per_day: int | None = None
    requests_per_minute: int = 120
    task_s: float = 600.0
    max_examples: int = 10_000
    max_norm: float = 1e9

    def __post_init__(self) -> None:
        for name in ("updates_per_day", "requests_per_minute", "task_s", "max_examples", "max_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}; expected a positive number.")


@dataclass
class Admission:
    """Applies the rules.

    Args:
        rules: The rules.
        secret: Signs tasks; 32 bytes that only the gateway knows.
    """

    rules: AdmissionRules
    secret: bytes
    _requests: dict[str, deque[float]] = field(default_factory=dict)

    def check_rate(self, device: str, now: float) -> None:
        """Counts a request.

        Raises:
            Refused: 429 if there are too many.
        """
        recent = self._requests.setdefault(device, deque())
        while recent and recent[0] <= now - MINUTE_S:
            recent.popleft()
        if len(recent) >= self.rules.requests_per_minute:
            wait = math.ceil(recent[0] + MINUTE_S - now)
            reason = f"More than {self.rules.requests_per_minute} requests in a minute."
            raise Refused(429, reason, kind="quota", retry_after=wait)
        recent.append(now)

    def check_conditions(self, conditions: Collection[str]) -> None:
        """Makes sure that what a device says of itself is enough.

        Raises:
            Refused: 412 if a condition does not hold.
        """
        lacking = [name for name in self.rules.conditions if name not in conditions]
        if lacking:
            raise Refused(412, f"The device is not {' and not '.join(lacking)}.", kind="condition")

    def check_quota(self, updates: Collection[float], time: float) -> None:
        """Makes sure that a device has not trained enough for today.

        Args:
            updates: When its updates were taken, by the wall clock.
            time: The wall clock.

        Raises:
            Refused: 429 if it has.
        """
        limit, recent = self.rules.updates_per_day, sorted(at for at in updates if time - DAY_S < at)
        if limit is not None and len(recent) >= limit:
            wait = math.ceil(recent[-limit] + DAY_S - time)
            reason = f"{limit} updates of this device were taken in the last 24 hours."
            raise Refused(429, reason, kind="quota", retry_after=wait)

    # ---- tasks

    def sign(self, device: str, version: int, time: float) -> str:
        """A task: that this device trains from this version, until its time is over."""
        return self._signed(device, version, int(time + self.rules.task_s))

    def read(self, device: str, task: str, time: float) -> int:
        """The version of a task.

        Raises:
            Refused: 403 if the gateway has not given it to this device, 410 if its time is over.
        """
        version, _, rest = task.partition(".")
        expires = rest.partition(".")[0]
        is_number = all(part.isascii() and part.isdigit() and len(part) < 16 for part in (version, expires))
        # First whether it is ASCII: `compare_digest` takes no other text.
        if not (is_number and task.isascii()) or not hmac.compare_digest(
            self._signed(device, int(version), int(expires)), task
        ):
            raise Refused(403, "This device was not given this task.", kind="task")
        if int(expires) < time:
            raise Refused(410, "This task has expired.", kind="late")
        return int(version)

    def _signed(self, device: str, version: int, expires: int) -> str:
        content = f"{version}.{expires}"
        return f"{content}.{hmac.new(self.secret, f'{device}.{content}'.encode(), hashlib.sha256).hexdigest()}"


class Refusals:
    """Counts refusals by kind, and lets the first of each device and kind in a round into the audit log.

    A device that is refused all the time would fill the disk.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._said: set[tuple[str, str]] = set()

    def note(self, device: str | None, facts: Mapping[str, object]) -> bool:
        """Counts a refusal; returns whether it is to be written down."""
        kind = str(facts.get("kind", "malformed"))
        self.counts[kind] = self.counts.get(kind, 0) + 1
        key = (device or _UNKNOWN, kind)
        is_new = key not in self._said
        self._said.add(key)
        return is_new

    def new_round(self) -> None:
        """Lets them into the log again."""
        self._said.clear()
