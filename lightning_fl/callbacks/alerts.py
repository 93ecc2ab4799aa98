"""Alerts when a run needs attention."""

from __future__ import annotations

import json
import logging
import math
import operator
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fl.callbacks.round_end import RoundEndCallback
from lightning_fl.federation.history import figures, left_out
from lightning_fl.strategies import FederatedStrategy

logger = logging.getLogger(__name__)

FAILED = "failed"
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
RULE = re.compile(
    r"(?P<name>\S+)\s+(?:is\s+(?P<nan>nan)|(?P<sign>[<>]=?|==)\s*(?P<value>\S+?))(?:\s+for\s+(?P<rounds>\d+)\s+rounds?)?"
)
TIMEOUT = 10.0  # seconds for one call of a webhook
PATIENCE = 5.0  # seconds to wait at the end for pending calls
MAX_WAITING = 100


@dataclass(frozen=True)
class Alert:
    """One alert.

    Args:
        rule: The rule that holds, as the user wrote it.
        round: The round, counted from 1.
        value: The figure; None if it is not finite, or if the run has failed.
        text: The alert as a sentence.
    """

    rule: str
    round: int
    value: float | None
    text: str


@dataclass(frozen=True)
class Rule:
    """A condition on a figure.

    Args:
        text: The condition as the user wrote it.
        name: The figure.
        sign: The comparison; ``nan`` for a figure that is not finite.
        value: The value with which it is compared.
        rounds: The number of consecutive rounds in which it has to hold.
    """

    text: str
    name: str
    sign: str
    value: float
    rounds: int

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parses a rule such as ``val_acc < 0.8 for 3 rounds``.

        Raises:
            ValueError: If the text is not a rule.
        """
        if text == FAILED:
            return cls(text, FAILED, FAILED, 0.0, 1)
        found = RULE.fullmatch(text.strip())
        try:
            if found is None:
                raise ValueError
            value, rounds = float(found["value"] or 0.0), int(found["rounds"] or 1)
            if rounds < 1:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{text!r} is not a rule; expected, for example, 'val_acc < 0.8', 'val_loss is nan', 'fl/update_norm > "
                f"10 for 3 rounds', or {FAILED!r} for a run that ends with an error."
            ) from None
        return cls(text, found["name"], found["nan"] or found["sign"], value, rounds)

    def holds(self, figure: float) -> bool:
        """Whether the condition holds for a figure."""
        return not math.isfinite(figure) if self.sign == "nan" else COMPARISONS[self.sign](figure, self.value)


class Alerts(RoundEndCallback):
    """Calls a function or a webhook when a figure of a round meets a rule, or when the run fails.

    A rule is ``NAME < VALUE`` (or ``<=``, ``>``, ``>=``, ``==``) or ``NAME is nan`` for a figure that is not finite,
    optionally with ``for N rounds`` if it has to hold in N consecutive rounds that log the figure; or ``failed``. Names
    are those of the loggers: the metrics that the module logs, and the round's own figures under ``fl/``, but never
    figures of a single client that privacy protects; ``fl/num_left_out`` is the number of clients whose update was not
    used. An alert is sent once when its rule begins to hold, and again only after it has stopped holding; also after a
    resume, none is sent twice.

    A webhook gets a ``POST`` with JSON: ``text``, which Slack and others show, and ``rule``, ``round``, ``value``. It
    is called in a separate thread: one that does not answer delays no round, and causes only a warning.

    Args:
        rules: The rules.
        to: A function of an :class:`Alert`, or the webhook's address.

    Raises:
        ValueError: If a text is not a rule, or an address doesn't begin with ``http://`` or ``https://``.

    Example:
        >>> import lightning as L
        >>> alerts = Alerts(["val_loss is nan", "fl/num_left_out > 2 for 3 rounds", "failed"], to=print)
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=[alerts], accelerator="cpu")
    """

    def __init__(self, rules: Sequence[str], to: Callable[[Alert], Any] | str) -> None:
        # Of a rule that is given twice each would count its rounds.
        self.rules = list(dict.fromkeys(Rule.parse(text) for text in rules))
        if not self.rules:
            raise ValueError("Alerts need at least one rule, such as 'val_loss is nan'.")
        if isinstance(to, str) and not to.startswith(("https://", "http://")):
            raise ValueError(f"{to!r} is not a webhook; expected an address that begins with https:// or http://.")
        self.to = Webhook(to) if isinstance(to, str) else to
        self._held: dict[str, int] = {}
        """The number of consecutive rounds in which each rule has held."""
        self._seen: set[str] = set()

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Looks at the figures that were logged in the round."""
        if not trainer.is_global_zero:
            return
        found = self.logged_in_round(trainer) | _of_round(trainer)
        self._seen.update(found)
        round = trainer.current_epoch + 1
        for rule in self.rules:
            if rule.name not in found:
                continue
            value = found[rule.name]
            self._held[rule.text] = self._held.get(rule.text, 0) + 1 if rule.holds(value) else 0
            if self._held[rule.text] == rule.rounds:
                text = f"Round {round}: {rule.name} is {value:.6g} ({rule.text})."
                self._tell(Alert(rule.text, round, value if math.isfinite(value) else None, text))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier run of another Trainer; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self._held, self._seen = {}, set()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Reports a failed run with its error's type only, because the message may contain data."""
        is_failure = not isinstance(exception, KeyboardInterrupt)
        if is_failure and trainer.is_global_zero and any(rule.name == FAILED for rule in self.rules):
            round = trainer.current_epoch + 1
            self._tell(Alert(FAILED, round, None, f"Round {round}: the run has failed ({type(exception).__name__})."))
        self._finish()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warns about rules whose figures were never logged."""
        unknown = [rule.text for rule in self.rules if rule.name not in {*self._seen, FAILED}]
        if unknown and self._seen:
            rank_zero_warn(
                f"The alerts {', '.join(map(repr, unknown))} are about figures that were never logged; the logged ones "
                f"are {', '.join(sorted(self._seen))}."
            )
        self._finish()

    def _tell(self, alert: Alert) -> None:
        try:
            self.to(alert)
        # An error in the user's function must not end the run.
        except Exception as error:
            rank_zero_warn(f"An alert could not be sent: {type(error).__name__}: {error}. The alert: {alert.text}")

    def _finish(self) -> None:
        if isinstance(self.to, Webhook):
            self.to.finish()

    def state_dict(self) -> dict[str, Any]:
        """The rules that hold, so that a resumed run sends no alert twice."""
        return {"held": dict(self._held), "seen": sorted(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the rules that hold."""
        self._held, self._seen = dict(state_dict["held"]), set(state_dict["seen"])


def _of_round(trainer: L.Trainer) -> dict[str, float]:
    strategy = trainer.strategy
    if not isinstance(strategy, FederatedStrategy):
        return {}
    entry, hides_clients = strategy.history[-1], strategy.view.settings.hides_clients
    found = figures(entry, hides_clients)
    return found if hides_clients else {**found, "fl/num_left_out": float(sum(left_out(entry).values()))}


class Webhook:
    """Sends alerts to an address, in a separate thread.

    Args:
        address: The address.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._waiting: queue.Queue[Alert] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def __call__(self, alert: Alert) -> None:
        """Queues an alert and returns immediately.

        Raises:
            queue.Full: If too many alerts are waiting.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
            self._thread.start()
        self._waiting.put_nowait(alert)

    def _run(self) -> None:
        while True:
            alert = self._waiting.get()
            try:
                body = json.dumps(asdict(alert)).encode()
                request = urllib.request.Request(self.address, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=TIMEOUT):
                    pass
            # Without the address, which often contains a secret.
            except Exception as error:
                kind = type(error).__name__
                logger.warning("The webhook could not be reached: %s: %s. The alert: %s", kind, error, alert.text)
            finally:
                self._waiting.task_done()

    def finish(self) -> None:
        """Waits briefly for pending calls."""
        deadline = time.monotonic() + PATIENCE
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)
