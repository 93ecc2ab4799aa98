"""What each package's module must show: the same weights in a federation of one, by each engine, and after a resume."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

# torchvision's compiled operators do not load beside a CPU build of torch, and then its import fails, and torchmetrics'
# with it. With the operators' names declared its Python can be imported; none of these checks runs an operator.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import lightning as L  # noqa: E402

import lightning_fl as fl  # noqa: E402

ROUNDS = 2
CLIENTS = 4
TOLERANCES = {"64-true": 1e-10, "32-true": 1e-5}


def with_fixed_draws(module: Any) -> Any:
    """Lets each step draw the same random numbers, because a client's are not those of a plain Trainer."""
    kind = type(module)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return kind.training_step(self, *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"training_step": training_step})
    return module


class Check:
    """The checks of one package.

    Args:
        make: Given a client's number, makes a new module, equal each time, and the client's loader.
        draws: Whether the module draws random numbers in training.
        precision: The Trainer's precision.
        folder: Where checkpoints go.
    """

    def __init__(self, make: Any, draws: bool, precision: str, folder: Path) -> None:
        self.make = make
        self.draws = draws
        self.precision = precision
        self.folder = folder

    def fit(self, strategy: Any, clients: int = 0, path: Any = None, saves: bool = False) -> Any:
        """Trains a new module; returns the Trainer and the module. Without clients on the data of client 0."""
        torch.manual_seed(0)
        module, loader = self.make(0)
        if self.draws:
            module = with_fixed_draws(module)
        loaders = {client: self.make(client)[1] for client in range(clients)}
        data = fl.datamodules.ClientLoaders(loaders) if clients else loader
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(self.folder, filename="{epoch}", save_top_k=-1)
        trainer = L.Trainer(
            max_epochs=ROUNDS,
            strategy=strategy,
            precision=self.precision,  # type: ignore[arg-type]
            accelerator="cpu",
            logger=False,
            callbacks=[checkpoint] if saves else [],
            enable_checkpointing=saves,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=path, weights_only=False if path else None)
        return trainer, module

    def run(self) -> dict[str, Any]:
        """All checks; for each the largest difference of a weight, relative to the largest weight."""
        plain_trainer, plain = self.fit("auto")
        one_trainer, one = self.fit(fl.FederatedStrategy(client_optimizer="keep"), 1)
        run, together = self.fit(fl.FederatedStrategy(engine="auto"), CLIENTS, saves=True)
        _, alone = self.fit(fl.FederatedStrategy(engine="sequential"), CLIENTS)
        _, resumed = self.fit(fl.FederatedStrategy(engine="auto"), CLIENTS, self.folder / "epoch=0.ckpt")
        groups = run.strategy.active_driver.trained_groups
        return {
            "plain": difference(one, plain),
            "engines": difference(together, alone),
            "resume": difference(resumed, together),
            "side_by_side": max(map(len, groups)),
            "moved": difference(plain, self.make(0)[0]),
            "predict": self.predict((one_trainer, one), (plain_trainer, plain)),
        }

    def predict(self, own: Any, plain: Any) -> float | str:
        """The largest difference of what two Trainers predict, or why a plain Trainer can't predict either."""
        # Lightning makes loaders anew to predict, and fails for some of the packages' own classes.
        batches = DataLoader(list(self.make(0)[1]), batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type,var-annotated]
        try:
            expected = plain[0].predict(plain[1], batches)
        except Exception as error:
            return f"nor does a plain Trainer: {type(error).__name__}"
        return compare(own[0].predict(own[1], batches), expected)


def as_it_is(batch: Any) -> Any:
    """The batch."""
    return batch


def weights(module: Any) -> torch.Tensor:
    """All tensors of a module's state, in one."""
    return torch.cat([t.detach().double().reshape(-1) for t in module.state_dict().values() if t.numel()])


def difference(own: Any, other: Any) -> float:
    """The largest difference of a tensor's element, relative to the largest element."""
    first, second = weights(own), weights(other)
    return float((first - second).abs().max() / second.abs().max())


def compare(own: Any, other: Any) -> float:
    """The largest difference of what two Trainers have predicted, relative to the largest value."""
    first, second = (
        [leaf.double() for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        for values in (own, other)
    )
    if not first or len(first) != len(second):
        raise ValueError(f"predict gave {len(first)} tensors, a plain Trainer {len(second)}")
    largest = max(float(b.abs().max()) for b in second if b.numel())
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True) if a.numel()) / largest


def main(name: str) -> None:
    """Checks the package of a file of this folder, and prints the result as JSON on the last line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"name": name}
    try:
        package = importlib.import_module(f"benchmarks.third_party.{name}")
        result["version"] = ", ".join(f"{own} {version(own)}" for own in package.DISTRIBUTIONS)
        result["what"] = package.WHAT
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # some packages write to the current folder
            for precision in getattr(package, "PRECISIONS", ("64-true",)):
                result["precision"] = precision
                result |= Check(package.make, getattr(package, "DRAWS", False), precision, Path(folder)).run()
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
