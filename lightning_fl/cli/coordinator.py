"""Runs the coordinator of a federation of silos on their own machines.

It reads only `trainer.strategy` of the training configuration: no module, no data, no code of yours. Classes from
outside lightning_fl are refused unless --allow names their package. federation.yaml defines who may take part and when
rounds open and close.

Examples:
  lightning-fl coordinator --config train.yaml --federation federation.yaml
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_fl.yaml_files import read_yaml

if TYPE_CHECKING:
    from lightning_fl import FederatedStrategy
    from lightning_fl.coordinator.config import FederationConfig
    from lightning_fl.coordinator.service import Coordinator


T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("--config", type=Path, required=True, help="the training configuration of the silos")
    parser.add_argument("--federation", type=Path, required=True, help="federation.yaml")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help="load classes of this package")


def run(args: argparse.Namespace) -> None:
    """Serves until the process is asked to stop."""
    try:
        from lightning_fl.coordinator.config import read_config
        from lightning_fl.coordinator.identity import Kit
    except ModuleNotFoundError as error:
        raise ImportError(f"A coordinator needs {error.name}: pip install 'lightning-fl[network]'.") from error
    strategy = read_strategy(args.config, args.allow)
    config = read_config(args.federation)
    asyncio.run(serve(strategy, config, Kit(config.kit)))


async def serve(strategy: FederatedStrategy, config: FederationConfig, kit: Any) -> None:
    """Serves until the process gets SIGTERM or SIGINT."""
    from lightning_fl.coordinator.http_server import HttpServer

    server = HttpServer(make_coordinator(strategy, config), kit)
    port = await server.start(config.host, config.port, config.admin_port)
    silos = ", ".join(config.rules.silos)
    print(
        f"Serving {config.rules.rounds} rounds for {silos} on port {port}; admin port {config.admin_port}.", flush=True
    )
    task = asyncio.create_task(server.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):  # on Windows, where Ctrl-C ends the process at once
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        print("Stopped. Start it again to continue.")
    finally:
        await server.stop()


def make_coordinator(strategy: FederatedStrategy, config: FederationConfig) -> Coordinator:
    """The coordinator of a federation that trains with a strategy."""
    from lightning_fl.clients.cohorts import describe_sampling
    from lightning_fl.coordinator.audit import AuditLog
    from lightning_fl.coordinator.kinds import kind_of
    from lightning_fl.coordinator.store import Store
    from lightning_fl.federation import FederationSettings
    from lightning_fl.strategies.network import settings_of_silo

    size = len(config.rules.silos)
    settings = FederationSettings(
        strategy.algorithm,
        strategy.aggregator,
        strategy.transforms,
        strategy.weighting,
        seed=strategy.seed or 0,
        population=size,
        sampling=describe_sampling(strategy.cohort, size, strategy.clients_per_round),
        schedule=strategy.schedule,
    )
    store = Store(config.folder)
    audit = AuditLog(config.folder / "audit.jsonl")
    return kind_of(settings)(settings, settings_of_silo(strategy), config.rules, store, audit, time.monotonic())


def read_strategy(path: Path, allow: Sequence[str] = ()) -> FederatedStrategy:
    """The strategy of a training configuration.

    Args:
        path: A configuration of LightningCLI.
        allow: Packages besides lightning_fl and torch whose classes it may name.

    Raises:
        ValueError: If it has no strategy, or names a class of another package.
    """
    content = read_yaml(path)
    trainer = content.get("trainer") if isinstance(content, Mapping) else None
    strategy = trainer.get("strategy") if isinstance(trainer, Mapping) else None
    if not isinstance(strategy, str | Mapping):
        raise ValueError(f"{path} has no trainer.strategy. Give the training configuration of the silos.")
    return make_strategy(strategy, allow)


def make_strategy(strategy: str | Mapping[str, Any], allow: Sequence[str] = ()) -> FederatedStrategy:
    """The strategy that a configuration describes: the name of an algorithm, or ``class_path`` with ``init_args``.

    Raises:
        ValueError: If it names a class of a package that is not allowed.
    """
    from lightning_fl import FederatedStrategy

    if isinstance(strategy, str):
        strategy = {"class_path": "FederatedStrategy", "init_args": {"algorithm": strategy}}
    return make_object(FederatedStrategy, strategy, allow)


def make_object(kind: type[T], content: Mapping[str, Any], allow: Sequence[str] = ()) -> T:
    """The object that a configuration describes.

    Args:
        kind: Its class or a base class.
        content: ``class_path`` and ``init_args``.
        allow: Packages besides lightning_fl whose classes it may name.

    Raises:
        ValueError: If it names a class of another package, or of another kind.
    """
    for class_path in _class_paths(content):
        package = class_path.partition(".")[0]
        if "." in class_path and package not in ("lightning_fl", *allow):
            raise ValueError(
                f"The configuration names the class {class_path}, but this process runs only code of lightning_fl. If "
                f"you trust it, start with --allow {package}."
            )
    from jsonargparse import ArgumentParser

    import lightning_fl

    lightning_fl.register()  # the classes and algorithms that it may name
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "object")
    found = parser.instantiate_classes(parser.parse_object({"object": content})).object
    assert isinstance(found, kind)
    return found


def _class_paths(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        own = [str(value["class_path"])] if "class_path" in value else []
        return own + [path for item in value.values() for path in _class_paths(item)]
    return [path for item in value for path in _class_paths(item)] if isinstance(value, list) else []
