"""The examples of the documentation run, on a model and data that are small."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl.algorithms import registry
from lightning_fl.cli import COMMANDS, FederatedCLI, federated_strategy_names, recipes_directory
from lightning_fl.strategies.loops import RoundEpochLoop
from tests.helpers.distributed import REPOSITORY
from tests.helpers.documents import blocks, imported_blocks
from tests.helpers.training import Ordinary, Plain, image_clients, trainer

DOCS = REPOSITORY / "docs"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
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
@pytest.mark.spread(4)
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
    for page in [*PAGES, CONTRIBUTING]:
        source = ""
        for file, test in re.findall(r"`([\w/]*\btest_\w+\.py)?(?:::)?(test_\w+)?`", page.read_text()):
            if file:
                path = REPOSITORY / ("" if file.startswith("tests/") else "tests/trainer") / file
                assert path.exists(), f"{name_of(page)} names {file}, which does not exist"
                source = path.read_text()
            if source:
                assert f"def {test}" in source, f"{name_of(page)} names {test}, which is not in {file or 'its file'}"


def hook(name: str) -> ModuleType:
    """A module of docs/hooks."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_rooms_is_that_of_the_code() -> None:
    rooms = hook("rooms")
    drawn = rooms.draw(*rooms.read_rooms(REPOSITORY / "lightning_fl"))
    assert drawn == (DOCS / "images" / "rooms.svg").read_text(), "run python docs/hooks/rooms.py"


ARCHITECTURE = DOCS / "architecture.md"


def test_the_files_that_the_architecture_names_exist() -> None:
    names = re.findall(r"`((?:[\w/]+/)?\w+\.py|\w+/)`", ARCHITECTURE.read_text())
    assert len(names) > 40
    places = [REPOSITORY / "lightning_fl", REPOSITORY, REPOSITORY / "lightning_fl" / "datamodules"]
    assert [name for name in names if not any((place / name).exists() for place in places)] == []


def test_a_batch_takes_the_way_that_the_architecture_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of clients that train one after the other calls the files of the table in its order."""
    text = ARCHITECTURE.read_text()
    table = re.findall(r"^\| (\d+) \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    assert [int(number) for number, _ in table] == list(range(1, len(table) + 1))
    told = [re.findall(r"(\d+) files", page.read_text().replace("**", "")) for page in (ARCHITECTURE, CONTRIBUTING)]
    assert told == [[str(len(table))]] * 2
    package, called = f"{REPOSITORY / 'lightning_fl'}{os.sep}", dict[str, None]()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            called[frame.f_code.co_filename.removeprefix(package)] = None

    advance = RoundEpochLoop.advance

    def traced(loop: RoundEpochLoop, fetcher: Any) -> None:
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            advance(loop, fetcher)
        finally:
            sys.setprofile(before)

    monkeypatch.setattr(RoundEpochLoop, "advance", traced)
    trainer(fl.FederatedStrategy("fedavg", engine="sequential")).fit(Plain(), image_clients())
    files = [file for _, file in table]
    assert [file for file in called if file in files] == files


def test_the_mathematics_of_docstrings_becomes_mathml() -> None:
    pytest.importorskip("latex2mathml")
    maths = hook("maths")
    docstring = fl.algorithms.Scaffold.__doc__ or ""
    text = maths.to_markdown(docstring)
    assert not re.search(r":math:|\.\. math", text)
    assert text.count(r"\[") == text.count(r"\]") == 1
    assert r"\begin{split}g &\leftarrow g - c_i + c \\" in text
    assert "Args:\n        server_lr" in text
    assert "[SCAFFOLD: Stochastic Controlled Averaging for Federated Learning](https://scholar.google.com/" in text
    html = maths.on_page_content(r'<p>of <span class="arithmatex">\(x &lt; y_i\)</span></p>')
    assert re.search(r"<p>of <math .*<msub><mi>y</mi><mi>i</mi></msub>.*</math></p>", html)
    assert "arithmatex" not in html
