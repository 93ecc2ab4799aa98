"""``gateway.yaml``: the strategy, the devices' local training, and the admission rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_fl.coordinator.config import read_entries
from lightning_fl.devices.admission import AdmissionRules

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway's settings.

    Args:
        strategy: As ``trainer.strategy`` of a training configuration: a name, or ``class_path`` and ``init_args``.
        schedule: ``class_path`` and ``init_args`` of ``Buffered`` or ``FedAsync``.
        step: The file of the training step.
        folder: The folder of the federation's files.
        rounds: Number of rounds.
        lr: Learning rate of the devices.
        batch_size: Number of examples in a step.
        shuffle: Whether devices shuffle their examples.
        rules: The admission rules.
        devices: The registry file of the devices. None: ``devices.json`` in the folder.
        pages: A folder with a web page. None: there is none.
        host: The address to listen on.
        port: The port; 0 for any free one.
        admin_port: A port on 127.0.0.1 for health, status and metrics. None: there is none.
        certificate: A file with the certificate chain, for HTTPS. None: HTTP, on this machine only.
        key: The file of the certificate's private key.
    """

    strategy: Any
    schedule: Any
    step: Path
    folder: Path
    rounds: int
    lr: float
    batch_size: int
    shuffle: bool = True
    rules: AdmissionRules = field(default_factory=AdmissionRules)
    devices: Path | None = None
    pages: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8490
    admin_port: int | None = 8491
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "lr", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a positive number.")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("Give certificate and key together; one of them is missing.")
        secrets = [self.folder, *(own for own in (self.devices, self.key) if own is not None)]
        pages = self.pages.resolve() if self.pages is not None else None
        for own in secrets:
            if pages is not None and pages in (own.resolve(), *own.resolve().parents):
                raise ValueError(f"pages is {self.pages}, which contains the private {own}. Give it another folder.")
        if self.certificate is None and self.host not in LOOPBACK:
            raise ValueError(
                f"host is {self.host!r}, but there is no certificate: tokens and models would be sent unencrypted. "
                "Give certificate and key, or put a TLS proxy in front and keep host: 127.0.0.1."
            )


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("step", "folder", "devices", "pages", "host", "certificate", "key"), str),
    **dict.fromkeys(("rounds", "batch_size", "port", "admin_port", "updates_per_day", "requests_per_minute"), int),
    **{
        "max_examples": int,
        "max_norm": (int, float),
        "lr": (int, float),
        "task_s": (int, float),
        "shuffle": bool,
        "conditions": list,
    },
    **{"strategy": (str, Mapping), "schedule": Mapping},
}
_NEEDED = ("strategy", "schedule", "step", "folder", "rounds", "lr", "batch_size", "max_examples")
_PATHS = ("step", "folder", "devices", "pages", "certificate", "key")


def read_config(path: Path) -> GatewayConfig:
    """Reads ``gateway.yaml``; paths in it are relative to its folder.

    Raises:
        ValueError: If an entry is missing, unknown or of the wrong type.
    """
    hints = {"max_examples": "A device's weight is the number of examples that it reports."}
    content = read_entries(path, _KINDS, _NEEDED, hints)
    for name, value in content.items():
        if name == "admin_port" and value is None:
            continue
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and name != "shuffle"):
            raise ValueError(f"{path} has {name}: {value!r}; expected {_shown(_KINDS[name])}.")
    values: dict[str, Any] = {name: path.parent / value if name in _PATHS else value for name, value in content.items()}
    if "conditions" in values:
        values["conditions"] = tuple(map(str, values["conditions"]))
    of_rules = {rule.name for rule in fields(AdmissionRules)}
    rules = AdmissionRules(**{name: values.pop(name) for name in list(values) if name in of_rules})
    return GatewayConfig(**values, rules=rules)


def _shown(kind: Any) -> str:
    return " or ".join(own.__name__.lower() for own in kind) if isinstance(kind, tuple) else str(kind.__name__)
