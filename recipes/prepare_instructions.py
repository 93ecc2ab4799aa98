"""Writes instructions about numbers: those of the base, and those of clients of which each has a kind of its own.

python recipes/prepare_instructions.py data/instructions
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

Kind = Callable[[random.Random], tuple[str, str]]


def one(name: str, answer: Callable[[int], object]) -> Kind:
    """A question about a number of two digits."""

    def ask(numbers: random.Random) -> tuple[str, str]:
        a = numbers.randrange(100)
        return f"{name} {a:02}", str(answer(a))

    return ask


def two(name: str, answer: Callable[[int, int], object]) -> Kind:
    """A question about two numbers of one digit."""

    def ask(numbers: random.Random) -> tuple[str, str]:
        a, b = numbers.randrange(10), numbers.randrange(10)
        return f"{name} {a} {b}", str(answer(a, b))

    return ask


BASE: Mapping[str, Kind] = {
    "copy": one("copy", lambda a: f"{a:02}"),
    "reverse": one("reverse", lambda a: f"{a:02}"[::-1]),
    "next": one("next", lambda a: (a + 1) % 100),
    "plus": two("plus", lambda a, b: a + b),
    "first": two("first", lambda a, b: a),
}
CLIENTS: Mapping[str, Kind] = {
    "second": two("second", lambda a, b: b),
    "larger": two("larger", max),
    "smaller": two("smaller", min),
    "last digit": one("last digit", lambda a: a % 10),
    "tens": one("tens", lambda a: a // 10),
    "even": one("even", lambda a: "yes" if a % 2 == 0 else "no"),
}


def write(path: Path, kinds: Mapping[str, Kind], number: int) -> None:
    """Writes a file of JSON lines."""
    numbers = random.Random(0)
    rows = []
    for client, kind in kinds.items():
        for _ in range(number):
            instruction, response = kind(numbers)
            rows.append(json.dumps({"client": client, "instruction": instruction, "response": response}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "base.jsonl", BASE, 2000)
    write(folder / "clients.jsonl", CLIENTS, 400)
    print(f"{folder}: {len(BASE)} kinds for the base, {len(CLIENTS)} clients")
