"""Runs the gateway for devices that train: browsers, phones and boards without torch.

gateway.yaml defines the strategy, the file of the training step, and which devices may train when. Each device has a
token.

Examples:
  lightning-fl gateway --config gateway.yaml --enrol phone-1 phone-2
  lightning-fl gateway --config gateway.yaml
  lightning-fl gateway --config gateway.yaml --revoke phone-1
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fl.devices.config import GatewayConfig
    from lightning_fl.devices.gateway import Gateway


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("--config", type=Path, required=True, help="gateway.yaml")
    parser.add_argument("--enrol", nargs="+", metavar="DEVICE", help="enrol devices, print their tokens, and exit")
    parser.add_argument("--revoke", nargs="+", metavar="DEVICE", help="revoke devices, and exit")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help="load classes of this package")


def run(args: argparse.Namespace) -> None:
    """Serves until the process is asked to stop, or enrols or revokes devices."""
    try:
        from lightning_fl.devices.config import read_config
        from lightning_fl.devices.registry import Registry
    except ModuleNotFoundError as error:
        raise ImportError(f"A gateway needs {error.name}: pip install 'lightning-fl[network]'.") from error
    config = read_config(args.config)
    if not (args.enrol or args.revoke):
        asyncio.run(serve(config, args.allow))
        return
    registry = Registry(devices_of(config))
    for name in args.enrol or ():
        print(registry.enrol(name))  # the only time that the token is shown
    for name in args.revoke or ():
        registry.revoke(name)


def devices_of(config: GatewayConfig) -> Path:
    """The path of the device registry."""
    return config.devices or config.folder / "devices.json"


def make_gateway(config: GatewayConfig, allow: Sequence[str] = ()) -> Gateway:
    """The gateway of a configuration.

    Raises:
        ValueError: If a setting of its strategy would be ignored.
    """
    from lightning_fl.cli.coordinator import make_object, make_strategy
    from lightning_fl.coordinator.audit import AuditLog
    from lightning_fl.coordinator.store import Store
    from lightning_fl.devices.gateway import Gateway, LocalPlan
    from lightning_fl.devices.registry import Registry
    from lightning_fl.federation import FederationSettings
    from lightning_fl.schedules import Asynchronous

    strategy = make_strategy(config.strategy, allow)
    schedule = make_object(Asynchronous, config.schedule, allow)
    epochs, steps = strategy.local_epochs, strategy.local_steps
    if not (isinstance(epochs, int | None) and isinstance(steps, int | None)):
        raise ValueError("Devices train for whole epochs or steps: give local_epochs or local_steps as a number.")
    ignored = {
        "num_clients": strategy.num_clients is not None,
        "clients_per_round": strategy.clients_per_round is not None,
        "partition": strategy.partition is not None,
        "schedule (a separate entry of gateway.yaml)": strategy.schedule is not None,
        "stragglers": strategy.stragglers is not None,
        "personal": bool(strategy.personal),
        "client_optimizer": strategy.client_optimizer != "reset",
    }
    given = [name for name, is_given in ignored.items() if is_given]
    if given:
        raise ValueError(f"A gateway would ignore {', '.join(given)} of the strategy. Leave it out.")
    seed = strategy.seed or 0
    settings = FederationSettings(
        strategy.algorithm,
        strategy.aggregator,
        strategy.transforms,
        strategy.weighting,
        seed=seed,
        population=1,
        schedule=schedule,
    )
    plan = LocalPlan(config.step, config.lr, config.batch_size, epochs or 1, steps, config.shuffle, seed)
    store = Store(config.folder)
    audit = AuditLog(config.folder / "audit.jsonl")
    return Gateway(settings, plan, config.rounds, config.rules, store, audit, Registry(devices_of(config)))


async def serve(config: GatewayConfig, allow: Sequence[str] = ()) -> None:
    """Serves until the process gets SIGTERM or SIGINT."""
    import ssl

    from lightning_fl.devices.http_gateway import HttpGateway

    server = HttpGateway(make_gateway(config, allow), config.pages)
    context = None
    if config.certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.certificate, config.key)
    port = await server.start(config.host, config.port, config.admin_port, context)
    scheme = "http" if context is None else "https"
    print(
        f"Serving {config.rounds} rounds on {scheme}://{config.host}:{port}; admin port {config.admin_port}.",
        flush=True,
    )
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await server.stop()
    print("Stopped. Start it again to continue.")
