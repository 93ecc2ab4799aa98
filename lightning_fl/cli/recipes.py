"""Lists the recipes that come with the package, shows one, or copies it to the current folder.

A recipe is a YAML file for `lightning-fl fit`; its header has the exact command, the expected number and the time.

Examples:
  lightning-fl recipes
  lightning-fl recipes show digits_fedavg
  lightning-fl recipes copy digits_fedavg
  lightning-fl fit --config digits_fedavg.yaml
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

import lightning_fl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("action", nargs="?", choices=("list", "show", "copy"), default="list")
    parser.add_argument("name", nargs="?", help="a recipe's name, for show and copy")
    parser.add_argument("to", nargs="?", type=Path, default=Path("."), help="where to copy it (default: here)")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def run(args: argparse.Namespace) -> None:
    """Lists, shows or copies."""
    if args.action == "list":
        list_recipes()
        return
    if args.name is None:
        raise ValueError(f"`recipes {args.action}` needs a name; `lightning-fl recipes` lists them.")
    recipe = find_recipe(args.name)
    if args.action == "show":
        print(recipe.read_text(encoding="utf-8"), end="")
    else:
        target = args.to / recipe.name if args.to.is_dir() else args.to
        copies = {target: recipe} | {target.parent / script.name: script for script in scripts(recipe)}
        there = [str(path) for path in copies if path.exists()]
        if there and not args.force:
            raise ValueError(
                f"{', '.join(there)} exists. Copy it elsewhere (recipes copy {args.name} DIR), or add --force."
            )
        for path, source in copies.items():
            path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        print("\n".join(commands(recipe, target)))


def recipes_directory() -> Path:
    """The folder of the recipes: inside an installed package, next to the package in a checkout."""
    package = Path(lightning_fl.__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def commands(recipe: Path, copy: Path) -> list[str]:
    """The commands of a recipe's header, with the paths of the copied recipe and script."""
    lines = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
    starts = ("lightning-fl", "torchrun", "for", "pip", "python")
    found = [line.lstrip("# ") for line in lines if line.lstrip("# ").split(" ")[0] in starts]
    return [
        line.replace(f"recipes/{recipe.name}", str(copy)).replace("recipes/", f"{copy.parent}/".removeprefix("./"))
        for line in found
    ]


def scripts(recipe: Path) -> list[Path]:
    """The scripts that a recipe's header runs, in the same folder."""
    return [path for path in sorted(recipe.parent.glob("*.py")) if f"recipes/{path.name}" in recipe.read_text("utf-8")]


def all_recipes() -> dict[str, Path]:
    """The recipes by name."""
    return {path.stem: path for path in sorted(recipes_directory().rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The recipe called ``name``, with or without ``.yaml``.

    Raises:
        ValueError: If there is none; the message suggests the closest name.
    """
    found = all_recipes()
    stem = Path(name).name.removesuffix(".yaml")
    if stem not in found:
        close = difflib.get_close_matches(stem, found, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no recipe {name!r}; the recipes are {', '.join(found)}.{hint}")
    return found[stem]


def list_recipes() -> None:
    """Prints each recipe's name, its title, the expected number and time from its header, and its path."""
    for name, path in all_recipes().items():
        header = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        facts = [line for line in header if line.startswith(("expected:", "time:"))]
        print("\n    ".join([name, header[0] if header else "", *facts, str(path)]))
