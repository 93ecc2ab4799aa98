"""Every datamodule and model is built from YAML with a short class path."""

from __future__ import annotations

import inspect
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import TensorDataset

from lightning_fl import datamodules, models
from tests.helpers.data_files import write_mnist

LANGUAGE = (
    "config: {model_type: llama, vocab_size: 300, hidden_size: 4, intermediate_size: 4, num_hidden_layers: 1, "
    "num_attention_heads: 1}"
)
ARGUMENTS: dict[str, str] = {
    "ClientDatasets": "",
    "PartitionedDataModule": "data: DigitsDataModule\npartitioner: IID",
    "TabularDataModule": "path: a.csv\ntarget: y\nclient: shop\ndrop: [z]",
    "LEAFDataModule": "root: data\nshape: [1, 28, 28]",
    "FEMNISTDataModule": "root: data",
    "LEAFShakespeareDataModule": "root: data",
    "ShakespeareDataModule": "root: data",
    "ImageFolderDataModule": "root: data\nclasses: [cat, dog]",
    "HuggingFaceDataModule": "path: some/set\nfeatures: [a, b]",
    "TorchDataModule": "train: {class_path: tests.datamodules.test_yaml.Numbers, init_args: {size: 6}}",
    "SiloClients": "data: {class_path: lightning_fl.datamodules.ShapesDataModule}",
    "InstructionDataModule": "path: instructions.jsonl",
    "MLPClassifier": "",
    "TabularMLP": "in_features: 3",
    "TabularRegressor": "in_features: 3",
    "DeepSurv": "in_features: 3",
    "CausalLM": LANGUAGE,
    "DPO": LANGUAGE + "\nlora: {r: 1, target_modules: [q_proj]}",
}
AROUND_ANOTHER = {"PartitionedDataModule", "SiloClients"}
ABSTRACT = {"CentralDataModule", "NaturalDataModule", "ClientDatasets", "Classifier"}


class Numbers(TensorDataset):
    def __init__(self, size: int) -> None:
        super().__init__(torch.arange(size))


def concrete(room: object, base: type) -> list[str]:
    found = [
        name for name in room.__all__ if inspect.isclass(getattr(room, name)) and issubclass(getattr(room, name), base)
    ]
    return [name for name in found if name not in ABSTRACT and not inspect.isabstract(getattr(room, name))]


def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str) -> LightningCLI:
    (tmp_path / "config.yaml").write_text(config + "trainer: {logger: false, accelerator: cpu}\n")
    monkeypatch.setattr("sys.argv", ["train", "--config", str(tmp_path / "config.yaml")])
    return LightningCLI(subclass_mode_model=True, subclass_mode_data=True, run=False, seed_everything_default=False)


def section(key: str, name: str) -> str:
    arguments = "".join(f"    {line}\n" for line in ARGUMENTS.get(name, "").splitlines())
    return f"{key}:\n  class_path: {name}\n" + (f"  init_args:\n{arguments}" if arguments else "")


@pytest.mark.parametrize("name", concrete(datamodules, L.LightningDataModule))
@pytest.mark.spread(10)
def test_datamodules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cli = build(tmp_path, monkeypatch, section("data", name) + section("model", "LogisticRegression"))
    assert type(cli.datamodule) is getattr(datamodules, name)


@pytest.mark.parametrize(
    "name", [name for name in concrete(datamodules, L.LightningDataModule) if name not in AROUND_ANOTHER]
)
@pytest.mark.spread(6)
def test_arguments_that_a_datamodule_passes_to_its_base_class_are_accepted_and_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = section("data", name) + ("" if ARGUMENTS.get(name) else "  init_args:\n")
    common = {"batch_size": 7, "val_share": 0.25, "seed": 3, "num_workers": 2, "eval_batch_size": 9}
    config += "".join(f"    {key}: {value}\n" for key, value in common.items())
    data = build(tmp_path, monkeypatch, config + section("model", "LogisticRegression")).datamodule
    assert (data.batch_size, data.seed, data.num_workers, data.eval_batch_size) == (7, 3, 2, 9)
    monkeypatch.setattr("sys.argv", ["train", "--data.help", name])
    with pytest.raises(SystemExit):
        LightningCLI(subclass_mode_model=True, subclass_mode_data=True, run=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Fraction of" in printed
    assert "Worker processes per loader. (type: int, default: 0)" in printed
    assert "Examples per batch in validation, test and prediction." in printed


@pytest.mark.parametrize(
    "name", [name for name in concrete(models, L.LightningModule) if not name.startswith(("Timm", "Torch", "Transf"))]
)
def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cli = build(tmp_path, monkeypatch, section("data", "DigitsDataModule") + section("model", name))
    assert type(cli.model) is getattr(models, name)


@pytest.mark.parametrize("strategy", ["fedavg", "auto"])
def test_one_configuration_trains_federated_and_centralised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    write_mnist(tmp_path / "data" / "fashion-mnist", num_train=100)
    data = (
        "data:\n  class_path: lightning_fl.datamodules.PartitionedDataModule\n  init_args:\n    num_clients: 5\n"
        "    data: {class_path: lightning_fl.datamodules.FashionMNISTDataModule, init_args: {batch_size: 10}}\n"
        "    partitioner: {class_path: lightning_fl.datamodules.LabelsPerClient, init_args: {num_labels: 4}}\n"
    )
    config = data + "model:\n  class_path: lightning_fl.models.TwoNN\ntrainer:\n"
    options = f"  strategy: {strategy}\n  max_epochs: 1\n  enable_checkpointing: false\n  enable_progress_bar: false\n"
    (tmp_path / "run.yaml").write_text(
        config + options + "  logger: false\n  accelerator: cpu\n  enable_model_summary: false\n"
    )
    monkeypatch.setattr("sys.argv", ["train", "--config", str(tmp_path / "run.yaml")])
    cli = LightningCLI(subclass_mode_model=True, subclass_mode_data=True, run=False, seed_everything_default=0)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 10
    assert "val_acc" in cli.trainer.callback_metrics
