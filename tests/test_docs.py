"""The examples of the documentation run, on a model and data that are small."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl.algorithms import registry
from lightning_fl.cli import COMMANDS, FederatedCLI, federated_strategy_names, recipes_directory
from tests.helpers.distributed import REPOSITORY
from tests.helpers.documents import blocks, imported_blocks
from tests.helpers.training import Ordinary, image_clients

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
SMALL: dict[str, Any] = {
    "max_epochs": 1,
    "limit_val_batches": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.fixture
def small_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    make = L.Trainer.__init__

    def init(self: L.Trainer, **options: Any) -> None:
        has_bar = any(isinstance(callback, ProgressBar) for callback in options.get("callbacks", ()))
        make(self, **{**options, **SMALL, "enable_progress_bar": has_bar})

    monkeypatch.setattr(L.Trainer, "__init__", init)
    monkeypatch.setattr(registry, "_ALGORITHMS", dict(registry._ALGORITHMS))


@pytest.mark.usefixtures("small_trainers")
@pytest.mark.filterwarnings("ignore:Trainer already configured with model summary callbacks")
@pytest.mark.filterwarnings("ignore:The `lightning` package's default logger")
@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    own = {"L": L, "fl": fl, "DataLoader": DataLoader, "model": Ordinary(), "data": image_clients(validate=True)}
    with imported_blocks(page, tmp_path / "site"):
        for index, source in enumerate(blocks(page, "python")):
            if "ckpt_path=" in source or "load_client(" in source:
                continue  # goes on from a file that the page's reader has
            exec(compile(source, f"{page.name} block {index}", "exec"), own)


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=name_of)
def test_yaml_is_a_configuration(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fl"])
    for text in blocks(page, "yaml"):
        config = yaml.safe_load(text)
        config = config if "trainer" in config else {"trainer": config}
        config["trainer"].pop("logger", None)
        config["trainer"] |= {"limit_train_batches": 1, **SMALL}
        config |= {"model": {"class_path": "MLPClassifier"}, "data": {"class_path": "DigitsDataModule"}}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        cli = FederatedCLI(["fit", "--config", "config.yaml", "--dry-run", "--trainer.callbacks", "null"])
        assert isinstance(cli.trainer.strategy, fl.FederatedStrategy)


def words_of_commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in lines
        if re.search(r"lightning-fl |-m lightning_fl ", line)
    ]


def test_commands_exist() -> None:
    texts = [text for page in PAGES for language in ("console", "bash", "sh") for text in blocks(page, language)]
    for words in (words for text in texts for words in words_of_commands(text)):
        start = words.index("lightning-fl") if "lightning-fl" in words else words.index("lightning_fl")
        command, *options = words[start + 1 :]
        assert command in {*FederatedCLI.subcommands(), *COMMANDS}, words
        for name in re.findall(r"recipes/(\w+)\.yaml", " ".join(options)):
            assert (recipes_directory() / f"{name}.yaml").exists()
        if "--trainer.strategy" in options:
            assert options[options.index("--trainer.strategy") + 1] in {"auto", *federated_strategy_names()}


def test_the_tests_that_pages_name_exist() -> None:
    """Pages write `tests/...` or a path in tests/trainer/, then `::test`; `test` alone is in the file named before."""
    for page in [*PAGES, REPOSITORY / "CONTRIBUTING.md"]:
        source = ""
        for file, test in re.findall(r"`([\w/]*\btest_\w+\.py)?(?:::)?(test_\w+)?`", page.read_text()):
            if file:
                path = REPOSITORY / ("" if file.startswith("tests/") else "tests/trainer") / file
                assert path.exists(), f"{name_of(page)} names {file}, which does not exist"
                source = path.read_text()
            if source:
                assert f"def {test}" in source, f"{name_of(page)} names {test}, which is not in {file or 'its file'}"


def test_the_mathematics_of_docstrings_becomes_mathml() -> None:
    pytest.importorskip("latex2mathml")
    import importlib.util

    spec = importlib.util.spec_from_file_location("maths", DOCS / "hooks" / "maths.py")
    assert spec is not None
    assert spec.loader is not None
    maths = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maths)
    docstring = fl.algorithms.Scaffold.__doc__ or ""
    text = maths.to_markdown(docstring)
    assert not re.search(r":math:|\.\. math", text)
    assert text.count(r"\[") == text.count(r"\]") == 1
    assert r"\begin{split}g &\leftarrow g - c_i + c \\" in text
    assert "Args:\n        server_lr" in text
    html = maths.on_page_content(r'<p>of <span class="arithmatex">\(x &lt; y_i\)</span></p>')
    assert re.search(r"<p>of <math .*<msub><mi>y</mi><mi>i</mi></msub>.*</math></p>", html)
    assert "arithmatex" not in html
