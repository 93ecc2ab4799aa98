"""Every text file is read and written as UTF-8, whatever the machine's locale is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lightning_fl", "recipes", "benchmarks", "docs", "examples")
TEXT_MODES = {"r", "w", "a", "x", "r+", "w+", "a+", "rt", "wt", "at"}


def without_encoding(source: str) -> Iterator[ast.Call]:
    """Calls that read or write text in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        given = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args]
        mode = next((getattr(word.value, "value", None) for word in node.keywords if word.arg == "mode"), None)
        if isinstance(node.func, ast.Name) and node.func.id == "open":
            mode = mode or (given[1] if len(given) > 1 else "r")
        elif not isinstance(node.func, ast.Attribute):
            continue
        elif node.func.attr == "fdopen":
            mode = mode or (given[1] if len(given) > 1 else "r")
        elif node.func.attr == "open":  # of a path, rather than of something else
            mode = mode or (given[0] if given else "r")
        elif node.func.attr == "read_text" and not given:
            mode = "r"
        elif node.func.attr == "write_text" and len(given) == 1:
            mode = "w"
        else:
            continue
        if mode in TEXT_MODES:
            yield node


def test_every_file_is_utf_8() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert found == [], 'write encoding="utf-8"'


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("open(p)", 1),
        ("open(p, 'w', newline='')", 1),
        ("p.open('a'); p.open(); p.open(mode='w')", 3),
        ("p.read_text(); p.write_text(x); os.fdopen(fd, 'w')", 3),
        ("open(p, 'rb'); p.open('r+b'); os.fdopen(fd, 'wb')", 0),
        ("open(p, encoding='utf-8'); p.read_text('utf-8'); p.write_text(x, 'utf-8')", 0),
        ("Round.open(settings, state); tarfile.open(a, 'r:gz'); machine.open(now)", 0),
    ],
)
def test_what_lacks_an_encoding_is_found(source: str, count: int) -> None:
    assert len(list(without_encoding(source))) == count


OF_OTHERS = ("DeprecationWarning", "FutureWarning")
"""What torch and Lightning warn of while they are imported."""
SCRIPT = """
import lightning as L
import lightning_fl as fl

module = fl.models.MLPClassifier()
data = fl.datamodules.PartitionedDataModule(fl.datamodules.DigitsDataModule(), fl.datamodules.IID(), 2)
record = fl.callbacks.RunRecord("größe")
options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(strategy="fedavg", max_epochs=1, callbacks=[record], enable_checkpointing=False, **options)
trainer.fit(module, data)
from lightning_fl.cli import main
main(["report", "größe"])
main(["init", "first"])
"""


@pytest.mark.slow
def test_a_run_without_a_locale_and_with_warnings_as_errors(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT, encoding="utf-8")
    words = [sys.executable, "-W", "error", *(f"-Wignore::{kind}" for kind in OF_OTHERS), "run.py"]
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    page = next(tmp_path.glob("gr*/report.html")).read_text(encoding="utf-8")
    assert "val_acc" in page
