"""Files from a network are read only if they are what they have to be."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest
import torch

import lightning_fl.coordinator
from lightning_fl.coordinator import wire
from lightning_fl.tree import flatten, unflatten

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(7, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flag": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
    "big": torch.randn(4, 4, dtype=torch.float64),
}


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    digest = wire.write(path, TENSORS, {"number": 1.5, "list": [None, "x"]})
    header = wire.read_header(path)
    assert header.fields == {"number": 1.5, "list": [None, "x"]}
    assert header.shapes == wire.shapes_of(TENSORS)
    found = wire.read(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert digest == wire.sha256(path)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = {
        wire.write(tmp_path / "one", TENSORS, {"a": 1, "b": 2}),
        wire.write(tmp_path / "two", dict(reversed(TENSORS.items())), {"b": 2, "a": 1}),
        wire.write(tmp_path / "three", {**TENSORS, "a": TENSORS["a"].t().contiguous().t()}, {"a": 1, "b": 2}),
    }
    assert len(digests) == 1


def test_nested_mappings_become_flat_and_nested_again() -> None:
    state = {"params": {"net.0.weight": torch.ones(2)}, "inner": {"deep": {"x": torch.zeros(1)}}, "t": torch.tensor(3)}
    flat = flatten(state)
    again = unflatten(flat)
    assert again.keys() == state.keys()
    assert torch.equal(again["inner"]["deep"]["x"], torch.zeros(1))


def test_the_first_difference_is_named() -> None:
    expected = wire.shapes_of(TENSORS)
    with pytest.raises(wire.BadFile, match=r"'a' is missing, expected F32 \[2, 3\]"):
        wire.check_shapes(expected, {k: v for k, v in expected.items() if k != "a"})
    with pytest.raises(wire.BadFile, match=r"'x' is F32 \[1\], expected missing"):
        wire.check_shapes(expected, {**expected, "x": ("F32", (1,))})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 100,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"[[[[",
        (60).to_bytes(8, "little") + json.dumps({"__metadata__": {"__fields__": "[]"}}).ljust(60).encode(),
        (60_000).to_bytes(8, "little") + b'{"a":' * 12_000,
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(wire.BadFile):
        wire.read_header(path)


@pytest.mark.parametrize("names", [["a", "a\x1fb"], ["\x1f" * 1_000_000]])
def test_names_that_can_not_be_nested_are_refused(tmp_path: Path, names: list[str]) -> None:
    """A name of a million parts would be a million mappings."""
    wire.write(tmp_path / "file", dict.fromkeys(names, torch.zeros(1)))
    with pytest.raises(wire.BadFile, match=r"below a tensor|parts, at most"):
        wire.read_header(tmp_path / "file")


def fuzz(path: Path, number: int) -> None:
    """Files with random changes are read, or refused as such: nothing else is raised."""
    wire.write(path, TENSORS, {"report": {"num_steps": 3}})
    whole = path.read_bytes()
    for seed in range(number):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            kind = rng.randrange(4)
            at = rng.randrange(min(len(data), 700)) if data else 0
            if kind == 0 and data:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif kind == 2:
                del data[at : at + rng.randrange(1, 9)]
            elif data:
                digits = [index for index, byte in enumerate(data[:700]) if 48 <= byte <= 57]
                data[rng.choice(digits or [0])] = rng.choice(b"0123456789-eE.")
        path.unlink()
        path.write_bytes(data)
        try:
            header = wire.read_header(path)
            wire.check_shapes(wire.shapes_of(TENSORS), header.shapes)
            unflatten(wire.read(path))
        except wire.BadFile:
            pass


def test_changed_files_are_read_or_refused(tmp_path: Path) -> None:
    fuzz(tmp_path / "file", 1000)


def test_nothing_on_the_wire_is_unpickled() -> None:
    folder = Path(lightning_fl.coordinator.__path__[0])
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Attribute):
                is_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
                assert not (is_torch and node.attr in ("load", "save")), f"{path}: torch.{node.attr}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
