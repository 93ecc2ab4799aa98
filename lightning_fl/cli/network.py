"""Creates the identities of a federation over a network, checks connections, and manages its coordinator.

Each silo creates its key on its own machine; only a certificate request is sent. The authority stays offline.

Examples:
  lightning-fl network ca init hospitals/ --name demo --host fl.example.org
  lightning-fl network request north --out kit/
  lightning-fl network approve hospitals/ north.csr
  lightning-fl network check https://fl.example.org --kit kit/
  lightning-fl network status
  lightning-fl network revoke hospitals/ north
  lightning-fl network export federation/ model.ckpt
  lightning-fl network audit verify federation/audit.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ADMIN = "http://127.0.0.1:8444"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    actions = parser.add_subparsers(dest="action", required=True)
    ca = actions.add_parser("ca", help="create a certificate authority and the coordinator's kit")
    ca.add_argument("verb", choices=["init"])
    ca.add_argument("folder", type=Path)
    ca.add_argument("--name", required=True, help="name of the federation")
    ca.add_argument("--host", action="append", required=True, help="name or address of the coordinator")
    request = actions.add_parser("request", help="at a silo: create a key and a certificate request")
    request.add_argument("name", help="name of the silo")
    request.add_argument("--out", type=Path, required=True, help="the silo's kit")
    approve = actions.add_parser("approve", help="at the authority: sign a request")
    approve.add_argument("folder", type=Path, help="the authority")
    approve.add_argument("request", type=Path, help="the request of a silo")
    approve.add_argument("--days", type=int, default=90, help="validity of the certificate in days")
    revoke = actions.add_parser("revoke", help="at the authority: revoke all certificates of a silo")
    revoke.add_argument("folder", type=Path, help="the authority")
    revoke.add_argument("name", help="name of the silo")
    renew = actions.add_parser("renew", help="at a silo: request another certificate for the same key")
    renew.add_argument("kit", type=Path)
    check = actions.add_parser("check", help="at a silo: find out why the coordinator can't be reached")
    check.add_argument("address", help="https://host or https://host:port")
    check.add_argument("--kit", type=Path, required=True)
    status = actions.add_parser("status", help="at the coordinator: show its state, until Ctrl-C")
    status.add_argument("--address", default=ADMIN, help=f"the admin port; {ADMIN}")
    status.add_argument("--once", action="store_true", help="show it once")
    export = actions.add_parser("export", help="at the coordinator: write the model as a checkpoint")
    export.add_argument("folder", type=Path, help="the coordinator's folder")
    export.add_argument("checkpoint", type=Path, help="the file to write")
    audit = actions.add_parser("audit", help="check that an audit log is complete, or show what a silo has sent")
    audit.add_argument("verb", choices=["verify", "show"])
    audit.add_argument("file", type=Path)


def run(args: argparse.Namespace) -> None:
    """Runs the action."""
    try:
        _ACTIONS[args.action](args)
    except ModuleNotFoundError as error:
        raise ImportError(f"This needs {error.name}: pip install 'lightning-fl[network]'.") from error


def _ca(args: argparse.Namespace) -> None:
    from lightning_fl.coordinator.identity import Authority, Kit

    certificate = Kit(args.folder / "coordinator").cert
    before = certificate.read_bytes() if certificate.exists() else None
    Authority.create(args.folder, args.name, args.host)
    if before not in (None, certificate.read_bytes()):
        print(
            f"{certificate} is new and valid for {', '.join(args.host)}. Copy it into the kit of the running "
            "coordinator, which reads it immediately; silos don't have to do anything."
        )
    print(
        f"The authority of {args.name!r} is in {args.folder}; keep it offline. The coordinator's kit is "
        f"{args.folder / 'coordinator'}: copy it to the coordinator."
    )


def _request(args: argparse.Namespace) -> None:
    from lightning_fl.coordinator.identity import make_request

    path = make_request(args.out, args.name)
    print(
        f"Send {path} to the keeper of the authority. {args.out / 'key.pem'} never leaves this machine.\n"
        f"Fingerprint, to be compared by telephone: {_fingerprint(path)}"
    )


def _approve(args: argparse.Namespace) -> None:
    from lightning_fl.coordinator.identity import Authority

    name, print_of_key, folder = Authority(args.folder).approve(args.request, args.days)
    print(
        f"Approved {name!r} for {args.days} days; fingerprint {print_of_key}\n"
        f"Send {folder / 'cert.pem'} and {folder / 'ca.pem'} back; they belong in the silo's kit."
    )


def _revoke(args: argparse.Namespace) -> None:
    from lightning_fl.coordinator.identity import Authority

    number = Authority(args.folder).revoke(args.name)
    print(
        f"Revoked {number} certificates of {args.name!r}. Copy {args.folder / 'crl.pem'} into the coordinator's kit; a "
        "running coordinator reads it immediately."
    )


def _renew(args: argparse.Namespace) -> None:
    from lightning_fl.coordinator.identity import Kit, make_request

    path = make_request(args.kit, Kit(args.kit).name)
    print(
        f"Send {path} to the keeper of the authority, and put the new cert.pem into {args.kit}: a running silo reads "
        "it at its next connection."
    )


def _check(args: argparse.Namespace) -> None:
    from lightning_fl.coordinator.diagnosis import diagnose

    for line in diagnose(args.address, args.kit):
        print(line)


def _export(args: argparse.Namespace) -> None:
    import lightning as L
    import torch

    from lightning_fl.coordinator.export import read_model

    state_dict, progress = read_model(args.folder)
    checkpoint: dict[str, Any] = {
        "state_dict": state_dict,
        "epoch": progress["round"],
        "global_step": progress["global_step"],
        "pytorch-lightning_version": L.__version__,
    }
    torch.save(checkpoint, args.checkpoint)
    print(f"Wrote the model after {progress['round']} rounds: MyModule.load_from_checkpoint({str(args.checkpoint)!r})")


def _status(args: argparse.Namespace) -> None:
    import json
    import time
    import urllib.request

    from rich.live import Live

    def ask() -> Any:
        # Bypass proxies, because the admin port is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{args.address}/status", timeout=5) as response:
            return _table(json.load(response))

    if args.once:
        from rich.console import Console

        Console().print(ask())
        return
    with Live(ask(), refresh_per_second=2) as live:
        while True:
            time.sleep(1)
            live.update(ask())


def _table(status: dict[str, Any]) -> Any:
    from rich.table import Table

    left = status["seconds_left"]
    title = f"{min(status['round'] + 1, status['rounds'])} of {status['rounds']} rounds: {status['phase']}"
    title += "" if left is None else f", {left:.0f} s left"
    title += f", waits for {status['lacks']} more" if status["lacks"] else ""
    table = Table("silo", "state", "last seen", title=title)
    for silo, seen in status["seen"].items():
        state = "refused" if silo in status["refused"] else "sent" if silo in status["sent"] else ""
        state = state or ("in the round" if silo in status["cohort"] else "-")
        table.add_row(silo, state, "never" if seen is None else f"{seen:.0f} s ago")
    return table


def _audit(args: argparse.Namespace) -> None:
    from lightning_fl.coordinator.audit import verify

    number, last = verify(args.file)
    if args.verb == "show":
        from rich.console import Console

        Console().print(_sent(args.file))
    print(f"{number} lines, each follows from the one before. The last one is {last}.")


def _sent(path: Path) -> Any:
    """A table of everything that the silo has sent, for the privacy officer."""
    import json

    from rich.markup import escape
    from rich.table import Table

    table = Table("time", "round", "what", "bytes", title="What this silo has sent")
    for event in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if event["event"] == "sending":
            what = event.get("topic") or f"change of {len(event['tensors'])} tensors, weight {event['weight']}"
            metrics = ", ".join(event.get("metrics", []))
            table.add_row(
                event["time"][:19],
                str(event["round"]),
                escape(what + (f"; means of {metrics}" if metrics else "")),
                f"{event['bytes']:,}",
            )
        elif event["event"] == "refused by policy":
            table.add_row(event["time"][:19], "-", escape(f"nothing: {event['reason']}"), "0")
    return table


def _fingerprint(path: Path) -> str:
    from cryptography import x509

    from lightning_fl.coordinator.identity import fingerprint

    return fingerprint(x509.load_pem_x509_csr(path.read_bytes()).public_key())


_ACTIONS = {
    "ca": _ca,
    "request": _request,
    "approve": _approve,
    "revoke": _revoke,
    "renew": _renew,
    "check": _check,
    "status": _status,
    "export": _export,
    "audit": _audit,
}
