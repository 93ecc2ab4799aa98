"""A federation of three devices that learn to read digits, in a folder: what a gateway and its devices need.

python devices/demo.py demo              # writes demo/
python devices/demo.py demo --evaluate   # the accuracy of its model on digits that no device has
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import lightning_fl as fl
from lightning_fl.coordinator.export import read_model
from lightning_fl.models import MLPClassifier

DEVICES = ("phone", "board", "browser")
NUM_TEST = 360
CONFIG = """\
strategy: fedavg
schedule: {class_path: Buffered, init_args: {size: 3, max_staleness: 5}}
step: step.onnx
folder: federation
rounds: 20
lr: 0.1
batch_size: 16
conditions: [charging]
max_examples: 1000
pages: pages
"""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 8 by 8 pixels, float32 from 0 to 1, and their digits, int64."""
    found = load_digits()
    return torch.from_numpy(found.images).float().unsqueeze(1) / 16, torch.from_numpy(found.target).long()


def write(folder: Path) -> None:
    """Writes the training step, the gateway's configuration, and each device's digits."""
    torch.manual_seed(0)
    x, y = digits()
    module = MLPClassifier(hidden=[64], lr=0.1)
    fl.devices.export_training_step(module, (x[:2], y[:2]), folder / "step.onnx")
    (folder / "gateway.yaml").write_text(CONFIG)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[NUM_TEST:]
    for name, rows in zip(DEVICES, order.chunk(len(DEVICES)), strict=True):
        save_file({"0": x[rows].contiguous(), "1": y[rows].contiguous()}, folder / f"{name}.safetensors")


def evaluate(folder: Path) -> float:
    """The share of test digits that the federation's model reads."""
    x, y = digits()
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:NUM_TEST]
    module = MLPClassifier(hidden=[64])
    module.load_state_dict(read_model(folder / "federation")[0])
    return float((module(x[rows]).argmax(1) == y[rows]).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()
    if args.evaluate:
        print(f"{evaluate(args.folder):.3f}")
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        write(args.folder)
        print(f"{args.folder} has step.onnx, gateway.yaml and the digits of {', '.join(DEVICES)}.")
