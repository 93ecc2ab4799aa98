"""Creates and shows a silo's identity for secure aggregation, and marks those of other silos as trusted.

Each silo creates an identity once and sends its identity.pub to the others. Compare fingerprints by telephone before
you trust a key. `trust` accepts files, or a line of such a file in quotes.

Examples:
  lightning-fl keys create keys/silo0 --name hospital-a
  lightning-fl keys show keys/silo0
  lightning-fl keys trust keys/silo0 hospital-b.pub hospital-c.pub
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fl.privacy.secagg.keys import PREFIX, KeyFolder, PublicIdentity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    commands = parser.add_subparsers(dest="action", required=True)
    create = commands.add_parser("create", help="create an identity")
    show = commands.add_parser("show", help="print the public key and the trusted ones")
    trust = commands.add_parser("trust", help="trust public keys of other silos")
    for action in (create, show, trust):
        action.add_argument("folder", type=Path, help="the folder of the silo's keys")
    create.add_argument("--force", action="store_true", help="replace an identity; the old one is kept by fingerprint")
    create.add_argument("--name", default="", help="a display name of the silo")
    trust.add_argument("public", nargs="+", help="an identity.pub of another silo, or its line in quotes")


def run(args: argparse.Namespace) -> None:
    """Creates, shows or trusts identities."""
    folder = KeyFolder(args.folder)
    if args.action == "create":
        if args.force and folder.exists():
            folder.set_aside()
        print(_described(folder.create(args.name)))
    elif args.action == "show":
        print(_described(folder.public()))
        for identity in folder.trusted():
            print(f"trusts {_described(identity)}")
    else:
        added = folder.trust([identity for text in args.public for identity in _read(text)])
        for identity in added:
            print(f"trusts {_described(identity)}")
        if not added:
            print("All of these are trusted already.")


def _described(identity: PublicIdentity) -> str:
    return f"{identity}\n    fingerprint {identity.fingerprint}"


def _read(text: str) -> list[PublicIdentity]:
    lines = [text] if text.startswith(PREFIX) else Path(text).read_text(encoding="utf-8").splitlines()
    return [PublicIdentity.parse(line) for line in lines if line.strip()]
