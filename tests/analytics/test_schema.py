from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_fl.analytics import federated_schema
from lightning_fl.cli import main
from lightning_fl.communication import Group
from lightning_fl.datamodules import TabularDataModule
from lightning_fl.datamodules.table_schema import TableSchema
from lightning_fl.privacy import SecureAggregation
from tests.contract.helpers import run_threads


def table(num_rows: int = 90) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "site": [f"silo {row % 3}" for row in range(num_rows)],
            "weight": rng.normal(70, 10, num_rows),
            "colour": rng.choice(["red", "green", "blue"], num_rows),
            "ill": rng.integers(0, 2, num_rows),
        }
    )


def by_silo() -> dict[str, pd.DataFrame]:
    return {name: rows.drop(columns="site") for name, rows in table().groupby("site")}


def test_it_is_the_schema_of_the_pooled_table(tmp_path: Path) -> None:
    pooled = table()
    found = federated_schema(pooled, "ill", client="site")
    assert found.notes == []
    assert found.schema.categories == {"colour": ["blue", "green", "red"]}
    assert found.schema.classes == [0, 1]
    assert found.schema.numeric["weight"] == pytest.approx((pooled.weight.mean(), pooled.weight.std(ddof=0)), rel=1e-12)
    found.schema.save(tmp_path / "schema.json")
    pooled.to_csv("table.csv", index=False)
    data = TabularDataModule("table.csv", target="ill", client="site", schema=tmp_path / "schema.json")
    data.setup()
    assert (data.num_features, data.num_classes) == (4, 2)


@pytest.mark.parametrize("secure", [False, True])
def test_ranks_agree_on_one_schema(secure: bool) -> None:
    categories = {"colour": ["red", "green", "blue"], "ill": ["0", "1"]}

    def check(group: Group) -> TableSchema:
        aggregator = SecureAggregation() if secure else None
        return federated_schema(
            table(), "ill", "site", group, aggregator, categories=categories if secure else None
        ).schema

    first, second = run_threads(2, check)
    assert first == second
    assert first.numeric["weight"] == pytest.approx(federated_schema(table(), "ill", "site").schema.numeric["weight"])


def test_errors_name_the_silo() -> None:
    silos = by_silo()
    silos["silo 1"] = silos["silo 1"].rename(columns={"weight": "wieght"})
    silos["silo 2"] = silos["silo 2"].drop(columns="colour").assign(weight="heavy")
    with pytest.raises(ValueError, match="can't train") as error:
        federated_schema(silos, "ill")
    told = str(error.value)
    assert "silo 1 has no column 'weight'; it has 'wieght'" in told
    assert "silo 2 has no column 'colour'" in told
    assert "silo 2 has 'weight' as text, most others as" in told
    assert "silo 0" not in told


def test_notes_name_the_silo() -> None:
    silos = by_silo()
    silos["silo 0"] = silos["silo 0"][["ill", "colour", "weight"]]
    silos["silo 1"] = silos["silo 1"].assign(weight=silos["silo 1"].weight * 1000)
    silos["silo 2"] = silos["silo 2"][silos["silo 2"].colour != "red"].assign(extra=1)
    notes = federated_schema(silos, "ill").notes
    assert len(notes) == 4, notes
    assert any("silo 0 has its columns in another order" in note for note in notes)
    assert any("silo 1 has 'weight' about" in note and "Check its unit" in note for note in notes)
    assert any("silo 2 has fewer than 5 rows with colour = 'red'" in note for note in notes)
    assert any("silo 2 has additional columns" in note for note in notes)


def test_rare_categories_and_numbers_to_predict_are_not_named() -> None:
    data = table()
    data.loc[:1, "colour"] = "octarine"
    found = federated_schema(data.assign(price=data.weight * 2), "price", "site")
    assert "octarine" not in found.schema.categories["colour"]
    assert found.schema.classes is None
    assert any("too few rows" in note for note in found.notes)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    table().to_csv("table.csv", index=False)
    main(["analyze", "table.csv", "--client", "site", "--schema", "schema.json", "--target", "ill"])
    assert "schema: schema.json, 4 features, ill is 2 classes" in capsys.readouterr().out
    assert TableSchema.load("schema.json").origin == "data"
    with pytest.raises(SystemExit):
        main(["analyze", "table.csv", "--client", "site", "--schema", "schema.json"])
    assert "go together" in capsys.readouterr().err
