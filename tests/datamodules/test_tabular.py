from __future__ import annotations

import gzip
from pathlib import Path

import lightning as L
import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fl.datamodules import ClientLoaders, TableSchema, TabularDataModule
from lightning_fl.models import TabularMLP, TabularRegressor

HEADER = "age,income,town,vip,shop,buys"


def rows(number: int = 60) -> list[str]:
    return [
        f"{20 + i},{1000.5 * i},{['Bonn', 'Ulm', 'Kiel'][i % 3]},{i % 2 == 0},{['north', 'south'][i % 5 == 0]},"
        f"{'yes' if i > number // 2 else 'no'}"
        for i in range(number)
    ]


def write(lines: list[str], name: str = "visits.csv") -> str:
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def table(lines: list[str] | None = None, **options: object) -> TabularDataModule:
    path = write([HEADER, *(rows() if lines is None else lines)])
    data = TabularDataModule(path, **{"target": "buys", "client": "shop", **options})
    data.setup()
    return data


def everything(data: TabularDataModule) -> tuple[torch.Tensor, torch.Tensor]:
    pieces = [data.pooled(part)[:] for part in ("train", "val", "test")]
    return torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces])


def test_a_column_names_the_clients_and_the_others_become_numbers() -> None:
    data = table(test_share=0.0)
    clients = data.train_dataloader()
    assert isinstance(clients, ClientLoaders)
    assert {client: clients.num_examples(client) for client in clients} == {"north": 48, "south": 12}
    assert data.schema.feature_names == ["age", "income", "vip", "town=Bonn", "town=Kiel", "town=Ulm"]
    assert (data.num_features, data.num_classes, data.schema.classes) == (6, 2, ["no", "yes"])
    x, y = data.pooled()[:]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert x[:, :3].mean(0).abs().max() < 1e-6
    assert torch.allclose(x[:, :3].std(0, correction=0), torch.ones(3), atol=1e-6)
    assert torch.equal(x[:, 3:].sum(1), torch.ones(60))
    south = data.client_dataset("south")[:]
    assert torch.equal(south[0][:, 0], torch.sort(south[0][:, 0]).values)
    assert south[1].tolist() == [int(i > 30) for i in range(0, 60, 5)]


def test_clients_with_leading_zeros_are_others() -> None:
    Path("codes.csv").write_text("a,c,y\n1,007,0\n2,7,1\n3,07,0\n")
    Path("numbers.csv").write_text("a,c,y\n1,10,0\n2,9,1\n3, 9,0\n")
    for name, expected in (("codes.csv", ["007", "07", "7"]), ("numbers.csv", [9, 10])):
        data = TabularDataModule(name, target="y", client="c", test_share=0.0)
        data.setup()
        assert data.client_ids == expected


def test_means_come_from_the_training_rows_alone() -> None:
    lines = rows(200)
    data = table(lines, test_share=0.5)
    x, _ = data.pooled("train")[:]
    assert x[:, :3].mean(0).abs().max() < 1e-5
    assert data.pooled("test")[:][0][:, 0].mean().abs() > 1e-4


def test_features_can_be_chosen_or_dropped() -> None:
    assert table(features=["income", "town"]).schema.feature_names[0] == "income"
    assert table(drop=["town", "vip"]).schema.feature_names == ["age", "income"]


@pytest.mark.parametrize(("column", "num_classes"), [("income", None), ("vip", 2), ("town", 3)])
def test_the_task_is_told_by_the_target(column: str, num_classes: int | None) -> None:
    data = table(target=column, drop=["buys"])
    assert data.num_classes == num_classes
    _, y = data.pooled()[:]
    assert y.dtype == (torch.float32 if num_classes is None else torch.int64)


def test_parquet_gzip_and_several_files(tmp_path: Path) -> None:
    frame = pandas.read_csv(write([HEADER, *rows()]))
    expected = everything(table())
    folder = tmp_path / "parts"
    folder.mkdir()
    frame[:20].to_parquet(folder / "a.parquet")
    (folder / "b.csv.gz").write_bytes(gzip.compress(frame[20:40].to_csv(index=False).encode()))
    frame[40:].to_csv(folder / "c.csv", index=False)
    for path in (folder, sorted(map(str, folder.iterdir()))):
        data = TabularDataModule(path, "buys", "shop")
        data.setup()
        assert all(map(torch.equal, everything(data), expected))


def test_without_a_client_column_the_table_is_in_one_place() -> None:
    data = table(client=None, drop=["shop"])
    loader = data.train_dataloader()
    assert isinstance(loader, DataLoader)
    assert len(loader.dataset) == 48


def test_silos_share_a_schema(tmp_path: Path) -> None:
    whole = table()
    whole.schema.save("schema.json")
    assert TableSchema.load("schema.json").feature_names == whole.schema.feature_names
    silo = TabularDataModule(write([HEADER, *rows()[:2]], "silo.csv"), "buys", schema="schema.json", test_share=0.0)
    silo.setup()
    x, y = silo.pooled()[:]
    assert x.shape == (2, 6)
    assert y.tolist() == [0, 0]
    assert x[:, 3:].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["schema.json", "silo.csv", "visits.csv"]
    with pytest.raises(ValueError, match="Leave out features, drop and task"):
        TabularDataModule("silo.csv", "buys", schema="schema.json", drop=["age"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("30,,Bonn,True,north,yes", r"missing or infinite values in the columns 'income' \(1\).*missing='mean'"),
        ("30,inf,Bonn,True,north,yes", r"missing or infinite values in the columns 'income' \(1\)"),
        ("30,5,,True,north,yes", r"columns 'town' \(1\)"),
        ("30,5,Bonn,True,,yes", "1 rows of visits.csv have no client in column 'shop'"),
        ("30,5,Bonn,True,north,", "1 rows of visits.csv have no value in the target 'buys'"),
        ("30,5,Bonn,True,north,yes,more,still,more", r"visits.csv can't be read: .*It may be corrupt"),
    ],
)
def test_rows_that_are_wrong_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table([*rows(), line])


def test_missing_features_may_become_the_mean() -> None:
    data = table([*rows(), "30,,,True,west,yes"], missing="mean", test_share=0.0)
    x, _ = data.client_dataset("west")[:]
    assert x[0, 1] == 0
    assert x[0, 3:].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="infinite"):
        table([*rows(), "30,inf,Bonn,True,north,yes"], missing="mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sells"}, r"has no column 'sells'; its columns are age, income, town, vip, shop, buys"),
        ({"client": "store"}, "has no column 'store'"),
        ({"features": ["age", "wage"]}, "has no column 'wage'"),
        ({"target": "town", "task": "regression"}, "is text; a regression needs numbers"),
        ({"drop": ["age", "income", "town", "vip"]}, "has no column left to predict 'buys' from"),
        ({"task": "ranking"}, "task='ranking' is unknown"),
        ({"missing": "drop"}, "missing='drop' is unknown"),
        ({"target": "shop"}, "target and client are both 'shop'"),
    ],
)
def test_settings_that_do_not_fit_the_table_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(**options)


def test_a_label_that_the_schema_does_not_know_is_refused() -> None:
    table().schema.save("schema.json")
    data = TabularDataModule(write([HEADER, "30,5,Bonn,True,north,maybe"]), "buys", "shop", schema="schema.json")
    with pytest.raises(
        ValueError, match=r"target 'buys' of visits.csv has the unknown labels maybe; expected one of no, yes"
    ):
        data.setup()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"target": "y"}', '{"target": "y", "numeric": {"a": [1]}, "categories": {}}']
)
def test_a_file_that_is_no_schema_is_refused(text: str) -> None:
    Path("schema.json").write_text(text)
    with pytest.raises(ValueError, match=r"schema.json is not a table schema"):
        TableSchema.load("schema.json")


def test_text_of_many_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'town' .* text with \d+ different values, more than 100; leave it out"):
        table([row.replace("Bonn", f"Town{i}") for i, row in enumerate(rows(600))])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "can't be read"),
        ("a.csv", b"x,y\n", "has no rows"),
        ("a.csv", b"\x00\xff\xfe" * 50, "can't be read|has no rows|has no column"),
        ("a.parquet", b"PAR1 cut short", "can't be read"),
        ("a.csv.gz", gzip.compress(b"x,y\n1,2\n" * 9000)[:60], "can't be read"),
        ("a.xlsx", b"", "is not a .csv, .csv.gz or .parquet file"),
    ],
    ids=["empty", "without rows", "binary", "cut parquet", "cut gzip", "unknown ending"],
)
def test_files_that_are_corrupt_are_refused(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TabularDataModule(name, "y").setup()


def test_files_that_are_not_there_or_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.csv does not exist; it was searched for in"):
        TabularDataModule("none.csv", "y").setup()
    with pytest.raises(FileNotFoundError, match=r"has no .csv, .csv.gz or .parquet file"):
        TabularDataModule(tmp_path, "y").setup()
    write(["x,y", "1,2"], "a.csv")
    write(["x,z", "1,2"], "b.csv")
    with pytest.raises(ValueError, match=r"columns of b.csv differ from those of a.csv"):
        TabularDataModule(["a.csv", "b.csv"], "y").setup()


@pytest.mark.parametrize("strategy", ["fedavg", "auto"])
@pytest.mark.parametrize("target", ["buys", "income"])
@pytest.mark.spread(2)
def test_the_same_module_trains_federated_and_centralised(strategy: str, target: str) -> None:
    torch.manual_seed(0)
    data = table(rows(200), target=target, batch_size=16)
    model = (
        TabularMLP(data.num_features, num_classes=2)
        if target == "buys"
        else TabularRegressor(data.num_features, target_mean=1e5, target_std=6e4, lr=0.02)
    )
    trainer = L.Trainer(
        max_epochs=10,
        accelerator="cpu",
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    if target == "buys":
        assert trainer.callback_metrics["val_acc"] > 0.9
    else:
        assert trainer.callback_metrics["val_mae"] < 0.2 * np.std(np.arange(200)) * 1000


def test_a_column_in_other_units_is_told(tmp_path: Path) -> None:
    TableSchema.from_ranges("ill", {"age": (0.0, 100.0)}, classes=["no", "yes"]).save("schema.json")

    def silo(factor: int) -> TabularDataModule:
        lines = ["age,ill", *(f"{factor * (20 + age)},{'yes' if age % 2 else 'no'}" for age in range(40))]
        data = TabularDataModule(write(lines, "silo.csv"), "ill", schema="schema.json")
        data.setup()
        return data

    silo(1)
    silo(2)
    with pytest.warns(UserWarning, match="'age' of silo.csv has values around 1.442e.04, where the schema expects 50 "):
        silo(365)


def test_values_that_the_schema_does_not_list_are_told(tmp_path: Path) -> None:
    data = table(test_share=0.0)
    data.schema.save("schema.json")
    other = [row.replace("Bonn", "53111") for row in rows(6)]
    silo = TabularDataModule(write([HEADER, *other], "silo.csv"), "buys", client="shop", schema="schema.json")
    with pytest.warns(
        UserWarning, match="Column 'town' of silo.csv has 2 values that the schema does not list, such as '53111'"
    ):
        silo.setup()
