"""Preprocessing by the data under differential privacy: exact figures are refused, private ones are in the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_fl as fl
from lightning_fl.datamodules import IID, BreastCancerDataModule, PartitionedDataModule, TableSchema, TabularDataModule
from lightning_fl.datamodules.image_files import ImageFilesDataModule
from lightning_fl.privacy import ClientLevelDP, Gaussian, Ledger, PrivateScaling, load_ledger
from tests.helpers.training import trainer

RANGES = {"age": (0.0, 100.0), "income": (0.0, 5e4)}
SCHEMA = TableSchema.from_ranges("buys", RANGES, {"town": ["Bonn", "Ulm"]}, ["no", "yes"])


class Net(L.LightningModule):
    def __init__(self, num_features: int = 4) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(num_features, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def table(**options: Any) -> TabularDataModule:
    rows = [
        f"{20 + i % 50},{100.5 * i},{['Bonn', 'Ulm'][i % 2]},shop{i % 6},{['no', 'yes'][i % 3 == 0]}" for i in range(90)
    ]
    Path("visits.csv").write_text("\n".join(["age,income,town,shop,buys", *rows]))
    return TabularDataModule("visits.csv", target="buys", client="shop", batch_size=5, **options)


class Images(ImageFilesDataModule):
    title, num_classes, folders, files = "Tiny", 2, (".",), ()

    def has_files(self, folder: Path) -> bool:
        return True

    def read_files(self, folder: Path) -> Any:
        images = torch.randint(256, (40, 1, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        labels = torch.arange(40) % 2
        return (images, labels), (images, labels)


def private(protected: str, **options: Any) -> tuple[list[Any], list[Any]]:
    """Transforms and callbacks."""
    if protected == "clients":
        return [ClientLevelDP(clip=0.1, noise_multiplier=1.0, method="rdp", **options)], []
    callback = fl.callbacks.SampleLevelDP(noise_multiplier=1.0, method="rdp", **options)
    return [], [callback] if protected == "examples" else []


def fit(protected: str, data: Any, rounds: int = 1, num_features: int = 4, ckpt: Any = None, **options: Any) -> Any:
    transforms, callbacks = private(protected, **options)
    run = trainer(fl.FederatedStrategy("fedavg", transforms=transforms), rounds, callbacks=callbacks)
    run.fit(Net(num_features), datamodule=data, ckpt_path=ckpt)
    run.save_checkpoint("last.ckpt")
    return run


def by_data(kind: str) -> tuple[Any, int]:
    if kind == "table":
        return table(), 4
    if kind == "a schema learned elsewhere":
        other = table()
        other.setup()
        other.schema.save("schema.json")
        return table(schema="schema.json"), 4
    if kind == "breast cancer":
        return PartitionedDataModule(BreastCancerDataModule(), IID(), num_clients=4), 30
    return PartitionedDataModule(Images(scaling=kind), IID(), num_clients=4), 4


@pytest.mark.parametrize("kind", ["table", "a schema learned elsewhere", "breast cancer", "channel", "pixel"])
@pytest.mark.parametrize("protected", ["clients", "examples"])
def test_exact_figures_of_the_data_are_refused(kind: str, protected: str) -> None:
    data, num_features = by_data(kind)
    with pytest.raises(MisconfigurationException, match="has learned from the training data"):
        fit(protected, data, num_features=num_features)


@pytest.mark.parametrize("kind", ["table", "breast cancer", "channel"])
def test_without_differential_privacy_they_are_not(kind: str) -> None:
    data, num_features = by_data(kind)
    fit("nobody", data, num_features=num_features)


@pytest.mark.parametrize("protected", ["clients", "examples"])
def test_public_knowledge_costs_nothing(protected: str) -> None:
    SCHEMA.save("schema.json")
    for data in (table(schema="schema.json"), PartitionedDataModule(Images(), IID(), num_clients=4)):
        run = fit(protected, data)
        assert 0.25 not in multipliers(run, protected)


def multipliers(run: Any, protected: str) -> list[float]:
    """Of each entry in the ledger, of the first client where clients have one each."""
    if protected == "clients":
        ledger = load_ledger(run.strategy.driver.state.transforms[0])
    else:
        (callback,) = (c for c in run.callbacks if isinstance(c, fl.callbacks.SampleLevelDP))
        ledger = next(iter(callback.ledgers(run).values()))
    return sorted(event.noise_multiplier for event, count in ledger for _ in range(count))


@pytest.mark.parametrize("protected", ["clients", "examples"])
def test_a_private_scaling_is_in_the_ledger_once_each_release(protected: str) -> None:
    SCHEMA.save("public.json")
    data = table(schema="public.json", scaling=PrivateScaling(RANGES, 0.25))
    run = fit(protected, data)
    steps = multipliers(run, protected).count(1.0)
    assert multipliers(run, protected) == [0.25, *[1.0] * steps]
    data.schema.save("schema.json")
    again = fit(protected, table(schema="schema.json"), 2, ckpt="last.ckpt")
    assert multipliers(again, protected) == [0.25, *[1.0] * 2 * steps]
    anew = table(schema="public.json", scaling=PrivateScaling(RANGES, 0.25))
    fresh = fit(protected, anew, 3, ckpt="last.ckpt")
    assert multipliers(fresh, protected) == [0.25, 0.25, *[1.0] * 3 * steps]


def test_epsilon_is_that_of_the_training_and_the_scaling() -> None:
    SCHEMA.save("public.json")
    run = fit("clients", table(schema="public.json", scaling=PrivateScaling(RANGES, 2.0)), delta=1e-3)
    expected = Ledger()
    expected.record(Gaussian(1.0))
    expected.record(Gaussian(2.0))
    assert run.strategy.history[0]["dp_epsilon"] == pytest.approx(float(expected.epsilon(1e-3, "rdp")), rel=1e-3)


def test_a_scaling_that_protects_examples_does_not_protect_clients() -> None:
    SCHEMA.save("public.json")
    data = table(schema="public.json", scaling=PrivateScaling(RANGES, 2.0, unit="example"))
    with pytest.raises(ValueError, match="protects an example, but ClientLevelDP protects clients"):
        fit("clients", data)
    fit("examples", data)


@pytest.mark.slow
def test_a_target_epsilon_does_not_cover_a_scaling() -> None:
    SCHEMA.save("public.json")
    callback = fl.callbacks.SampleLevelDP(target_epsilon=3.0)
    data = table(schema="public.json", scaling=PrivateScaling(RANGES, 2.0))
    with pytest.raises(MisconfigurationException, match="target_epsilon chooses the noise for the training only"):
        trainer("fedavg", callbacks=[callback]).fit(Net(), datamodule=data)


def test_a_budget_covers_the_scaling_too() -> None:
    SCHEMA.save("public.json")
    data = table(schema="public.json", scaling=PrivateScaling(RANGES, 0.1))
    for protected in ("clients", "examples"):
        with pytest.raises(fl.privacy.PrivacyBudgetExceeded):
            fit(protected, data, max_epsilon=10.0)


def test_a_scaling_needs_a_public_schema_with_the_same_columns() -> None:
    with pytest.raises(ValueError, match="Give a schema of public knowledge too"):
        table(scaling=PrivateScaling(RANGES, 1.0))
    SCHEMA.save("public.json")
    with pytest.raises(ValueError, match="the numeric columns of the schema are age, income"):
        table(schema="public.json", scaling=PrivateScaling({"age": (0.0, 1.0)}, 1.0)).setup()


def test_a_schema_keeps_where_it_comes_from() -> None:
    SCHEMA.save("public.json")
    data = table(schema="public.json", scaling=PrivateScaling(RANGES, 2.0))
    data.setup()
    data.schema.save("schema.json")
    assert TableSchema.load("schema.json") == data.schema
    assert data.schema.origin == "private"
    Path("schema.json").write_text(Path("schema.json").read_text().replace('"private"', '"public"'))
    with pytest.raises(ValueError, match="not a table schema"):
        TableSchema.load("schema.json")
