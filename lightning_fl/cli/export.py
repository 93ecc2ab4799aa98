"""Exports the model of a run or a checkpoint, and checks the file by running it before it is kept.

Formats: safetensors (weights only), torch (torch.export), onnx, executorch, hub (a folder with weights, config.json and
a model card), adapter (a folder with the adapters alone, in peft's format).

Examples:
  lightning-fl export lightning_logs/version_0 --to onnx
  lightning-fl export last.ckpt --to safetensors --client north --out north.safetensors
  lightning-fl export last.ckpt --to hub --module my_package.MyModule --shape 3,32,32 --out model
"""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("safetensors", "torch", "onnx", "executorch", "hub", "adapter")
"""The names of :data:`lightning_fl.serving.FORMATS`, which imports torch. A test compares them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format")
    parser.add_argument("--client", help="export the personalised model of this client")
    parser.add_argument("--merge-adapters", action="store_true", help="merge peft adapters into their layers")
    parser.add_argument(
        "--out", type=Path, help="the file, or for hub and adapter the folder (default: model.* in this folder)"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select the model."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's folder, or a .ckpt file")
    parser.add_argument("--module", help="the module's class, package.Class, if the run does not name it")
    parser.add_argument("--base", type=Path, help="a file with the frozen parameters, if the checkpoint has none")
    parser.add_argument("--shape", type=_shape, help="shape of one input example, such as 3,32,32")


def run(args: argparse.Namespace) -> None:
    """Exports, and prints the path of the file."""
    from lightning_fl import serving
    from lightning_fl.serving.loading import read

    checkpoint = serving.find_checkpoint(args.run)
    module = serving.load_module(checkpoint, args.module, args.client, args.base)
    inputs = serving.example_inputs(module, checkpoint, args.shape)
    if args.merge_adapters and args.to == "adapter":
        raise ValueError("Adapters are either merged or saved separately. Leave out --merge-adapters or --to adapter.")
    out = args.out or Path("adapter" if args.to == "adapter" else f"model{serving.FORMATS[args.to].suffix}")
    own = {"hub": "config.json", "adapter": "adapter_config.json"}.get(args.to)
    if own is not None and out.is_dir() and not (out / own).exists() and any(out.iterdir()):
        raise ValueError(f"{out} is a folder with other files. Name a new one with --out.")

    def write_card(folder: Path) -> None:
        card = serving.model_card(read(checkpoint), module, is_personal=args.client is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")

    difference = serving.export(
        module, out, args.to, inputs, write_card if args.to == "hub" else None, args.merge_adapters
    )
    print(f"{out}: {type(module).__name__} of {checkpoint}; its outputs differ by {difference:.1g} of the largest")


def _shape(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write 64, or 3,32,32 (without the batch)")
    return found
