"""Exported files, each in its own runtime, and what is refused."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import lightning as L
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl import serving
from lightning_fl.cli.main import main
from lightning_fl.models import MLPClassifier
from lightning_fl.serving.model_card import model_card
from lightning_fl.strategies.checkpoint import KEY
from tests.helpers.distributed import PATIENCE, run_script

MODULE = "lightning_fl.models.MLPClassifier"


def export(checkpoint: Path, to: str, *words: str) -> None:
    main(["export", str(checkpoint), "--to", to, "--module", MODULE, "--shape", "1,8,8", *words])


def global_model(checkpoint: Path) -> L.LightningModule:
    return MLPClassifier.load_from_checkpoint(checkpoint).eval()


def test_weights_alone(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    export(checkpoint, "safetensors", "--out", "weights.safetensors")
    found, expected = load_file("weights.safetensors"), global_model(checkpoint).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_program_runs_without_the_class(checkpoint: Path) -> None:
    export(checkpoint, "torch", "--out", "model.pt2")
    x = torch.rand(5, 1, 8, 8)
    (found,) = torch.export.load("model.pt2").module()(x)
    torch.testing.assert_close(found, global_model(checkpoint)(x), rtol=1e-5, atol=1e-5)


def test_onnx_takes_any_batch_size(checkpoint: Path) -> None:
    import onnxruntime

    export(checkpoint, "onnx", "--out", "model.onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    for size in (1, 7):
        x = torch.rand(size, 1, 8, 8)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), global_model(checkpoint)(x), rtol=1e-5, atol=1e-5)


EXECUTORCH = ["executorch==1.5.1", "torchao==0.18.0", "pytorch_tokenizers==1.5.0"]
ITS_NEEDS = ["flatbuffers", "ruamel.yaml", "tabulate"]
IN_EXECUTORCH = """
import sys, torch
from executorch.runtime import Runtime
from lightning_fl.cli.main import main
main(["export", sys.argv[1], "--to", "executorch", "--module", sys.argv[2], "--shape", "1,8,8", "--out", "model.pte"])
method = Runtime.get().load_program("model.pte").load_method("forward")
inputs = [torch.rand(size, 1, 8, 8) for size in (1, 7)]
torch.save([(one, method.execute([one])[0].clone()) for one in inputs], "answers.pt")
"""


@pytest.fixture
def with_executorch(tmp_path: Path) -> Path:
    """An interpreter that has ExecuTorch besides what this one has; without what it asks for beyond running."""
    own = tmp_path / "executorch"
    subprocess.run([sys.executable, "-m", "venv", own], check=True, timeout=PATIENCE)
    (packages,) = own.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    install = [own / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", *EXECUTORCH, *ITS_NEEDS]
    subprocess.run(install, check=True, timeout=2 * PATIENCE)
    return own / "bin" / "python"


@pytest.mark.slow
def test_executorch_takes_any_batch_size(checkpoint: Path, with_executorch: Path) -> None:
    run_script([str(with_executorch), "-W", "ignore", "-c", IN_EXECUTORCH, str(checkpoint), MODULE])
    for x, found in torch.load("answers.pt", weights_only=True):
        torch.testing.assert_close(found, global_model(checkpoint)(x), rtol=1e-5, atol=1e-5)


def test_one_clients_model(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    export(checkpoint, "safetensors", "--client", "1", "--out", "one.safetensors")
    found, expected = load_file("one.safetensors"), fl.load_client(checkpoint, 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["net.3.weight"], global_model(checkpoint).state_dict()["net.3.weight"])


def test_a_folder_for_the_hub_has_a_card_without_client_names(checkpoint: Path) -> None:
    export(checkpoint, "hub", "--out", "model")
    card = Path("model/README.md").read_text(encoding="utf-8")
    assert "FedAvg" in card
    assert "| rounds | 2 |" in card
    assert "| clients in the last round | 3 |" in card
    assert "train_loss" not in card
    config = json.loads(Path("model/config.json").read_text(encoding="utf-8"))
    assert config["inputs"] == [{"shape": ["batch", 1, 8, 8], "dtype": "torch.float32"}]
    assert config["hyper_parameters"]["hidden"] == [16]


def test_a_card_hides_the_cohort_that_differential_privacy_hides(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content[KEY]["metrics"]["fl/dp_epsilon"] = torch.tensor(3.5)
    card = model_card(content, global_model(checkpoint))
    assert "epsilon 3.5" in card
    assert "clients in the last round" not in card


class Hidden(MLPClassifier):
    """Its outputs are infinite in places, as masked scores are; and there are some of another kind."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores.masked_fill(scores < 0, -torch.inf), scores > 0


def test_infinite_and_boolean_outputs_are_compared() -> None:
    assert serving.export(Hidden(hidden=[4]), "hidden.pt2", "torch", (torch.rand(2, 64),)) < 1e-5


class Coin(MLPClassifier):
    """Its outputs are different at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(1)


def test_a_file_that_computes_something_else_is_not_kept() -> None:
    with pytest.raises(ValueError, match=r"outputs of the .* differ from"):
        serving.export(Coin(hidden=[4]), "coin.pt2", "torch", (torch.rand(2, 64),))
    assert list(Path().iterdir()) == []


class Branch(MLPClassifier):
    """Can't be exported: its way depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_what_cant_be_exported_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="Branch can't be exported to torch"):
        serving.export(Branch(hidden=[4]), "branch.pt2", "torch", (torch.rand(2, 64),))
    assert list(Path().iterdir()) == []


def test_an_exported_module_is_not_changed() -> None:
    module = MLPClassifier(hidden=[4]).train()
    serving.export(module, "weights.safetensors", "safetensors", (torch.rand(2, 64),))
    assert module.training


class Mine(L.LightningModule):
    """A module of the user's, which has saved its hyper-parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, width)
        self.example_input_array = torch.zeros(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def save(module: L.LightningModule, path: str, **more: object) -> Path:
    trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(module)
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), **more}
    torch.save({**checkpoint, "pytorch-lightning_version": L.__version__}, path)
    return Path(path)


def test_a_checkpoint_alone_does_not_choose_the_code_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = save(Mine(2), "mine.ckpt")
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["_class_path"] = "never_imported.Mine"
    torch.save(content, path)
    with pytest.raises(SystemExit):
        main(["export", str(path), "--to", "safetensors"])
    assert "If you trust the checkpoint, give --module never_imported.Mine" in capsys.readouterr().err
    assert "never_imported" not in sys.modules
    module = serving.load_module(save(Mine(2), "mine.ckpt"), f"{Mine.__module__}.Mine")
    (inputs,) = serving.example_inputs(module, path)
    assert inputs.shape == (2, 4)


@pytest.mark.parametrize("content", [b"", b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04 truncated"])
def test_a_damaged_or_pickled_checkpoint_is_refused(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.ckpt").write_bytes(content)
    with pytest.raises(SystemExit):
        main(["export", "bad.ckpt", "--to", "safetensors", "--module", MODULE])
    assert "is not a checkpoint that can be loaded safely" in capsys.readouterr().err


def test_an_input_is_asked_for(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), "--to", "torch", "--module", MODULE])
    assert "Give --shape" in capsys.readouterr().err


def test_a_run_of_the_command_line_needs_no_options() -> None:
    fit = ["fit", "--model", "MLPClassifier", "--model.hidden", "[4]", "--data", "DigitsDataModule"]
    fit += ["--trainer.strategy", "fedavg", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    fit += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "CSVLogger"]
    main([*fit, "--trainer.logger.save_dir", "logs", "--trainer.limit_val_batches", "1"])
    main(["export", "logs", "--to", "safetensors"])
    assert Path("model.safetensors").exists()


class Adapted(L.LightningModule):
    """A perceptron whose first layer is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.net = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        self.example_input_array = torch.rand(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_adapters_merged_and_apart() -> None:
    module, x = Adapted().eval(), torch.rand(5, 4)
    with torch.no_grad():
        expected = module(x)
    assert serving.export(module, "merged.safetensors", "safetensors", (x[:2],), merge_adapters=True) < 1e-6
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))  # peft is not needed any more
    merged = load_file("merged.safetensors")
    plain.load_state_dict({name.removeprefix("net."): own for name, own in merged.items()})
    torch.testing.assert_close(plain(x), expected)
    assert serving.export(module, "adapter", "adapter", (x[:2],)) == 0
    held = load_file("adapter/adapter_model.safetensors")
    assert sum(own.numel() for own in held.values()) == 2 * 4 + 8 * 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, "adapter")(x), expected)
    assert isinstance(module.net, peft.PeftModel)  # the module is not changed


def test_a_model_without_adapters_has_none_to_write_or_merge() -> None:
    module, x = MLPClassifier(hidden=[4]), torch.rand(2, 64)
    with pytest.raises(ValueError, match="contains no peft adapters"):
        serving.export(module, "adapter", "adapter", (x,))
    with pytest.raises(ValueError, match="contains no peft adapters"):
        serving.export(module, "merged.pt2", "torch", (x,), merge_adapters=True)
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_adapters_of_a_language_model() -> None:
    tiny = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    module = fl.models.CausalLM(config={**tiny, **sizes}, lora={"r": 2, "target_modules": ["q_proj"]}).eval()
    with torch.no_grad():
        for name, param in module.named_parameters():
            if "lora_B" in name:
                param.normal_()
    own = L.Trainer(logger=False, accelerator="cpu", max_epochs=0, enable_progress_bar=False)
    own.strategy.connect(module)
    own.save_checkpoint("model.ckpt")
    tokens = torch.randint(0, 50, (2, 7))
    loaded = serving.load_module("model.ckpt", "lightning_fl.models.CausalLM")
    assert serving.export(loaded, "merged.safetensors", "safetensors", (tokens,), merge_adapters=True) < 1e-5
    assert not any("lora" in name for name in load_file("merged.safetensors"))
    assert serving.export(loaded, "adapter", "adapter", (tokens,)) == 0
