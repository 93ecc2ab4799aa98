"""``lightning-fl keys``: a silo's identity for secure aggregation, and whom it trusts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_fl.privacy.secagg.keys import PREFIX, KeyFolder, PublicIdentity


def keys(args: Sequence[str]) -> None:
    """Runs ``lightning-fl keys create|show|trust``.

    Raises:
        SystemExit: With code 2 if something is wrong; nothing has been changed then.
    """
    parser = argparse.ArgumentParser("lightning-fl keys", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make an identity")
    show = commands.add_parser("show", help="print the public key and whom it trusts")
    trust = commands.add_parser("trust", help="add public keys of other silos to those trusted")
    for command in (create, show, trust):
        command.add_argument("folder", type=Path, help="where the silo's keys lie")
    create.add_argument("--name", default="", help="what people call the silo")
    trust.add_argument("public", nargs="+", help="an identity.pub of another silo, or its line in quotes")
    options = parser.parse_args(args)
    try:
        folder = KeyFolder(options.folder)
        if options.command == "create":
            print(_described(folder.create(options.name)))
        elif options.command == "show":
            print(_described(folder.public()))
            for identity in folder.trusted():
                print(f"trusts {_described(identity)}")
        else:
            added = folder.trust([identity for text in options.public for identity in _read(text)])
            for identity in added:
                print(f"trusts {_described(identity)}")
            if not added:
                print("All of these are trusted already.")
    except (ValueError, OSError) as error:
        print(f"lightning-fl keys: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _described(identity: PublicIdentity) -> str:
    return f"{identity}\n    fingerprint {identity.fingerprint}"


def _read(text: str) -> list[PublicIdentity]:
    lines = [text] if text.startswith(PREFIX) else Path(text).read_text().splitlines()
    return [PublicIdentity.parse(line) for line in lines if line.strip()]
