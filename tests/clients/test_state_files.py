from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fl.clients.state_files import StateFiles

STATE = {
    "algorithm": {"control": {"body.0.weight": torch.randn(2, 3), "count": torch.tensor(3)}},
    "optimizer": {"0.0.exp_avg": torch.zeros(2, dtype=torch.bfloat16).t(), "0.0.flag:number": torch.tensor(True)},
}
OTHER = {"algorithm": {"control": {"body.0.weight": torch.ones(2, 3)}}}


@pytest.fixture
def files(tmp_path: Path) -> StateFiles:
    return StateFiles(tmp_path / "client_states")


def num_versions(files: StateFiles) -> int:
    return len(list(files.root.rglob("*.safetensors")))


@pytest.mark.parametrize("client", ["a", 0, "0", -1, "../../up", "a/b", "ä ö", "", "con\n"], ids=repr)
def test_a_state_comes_back_as_it_was_and_can_be_collected(files: StateFiles, client: int | str) -> None:
    name = files.write(client, STATE)
    torch.testing.assert_close(files.read(client, name), STATE, rtol=0, atol=0)
    (path,) = files.root.rglob("*.safetensors")
    assert path.resolve().is_relative_to((files.root / "versions").resolve())
    files.collect()
    assert num_versions(files) == 0


def test_the_same_state_is_one_version_and_another_is_another(files: StateFiles) -> None:
    names = [files.write("a", state) for state in (STATE, STATE, OTHER)]
    assert names[0] == names[1] != names[2]
    assert num_versions(files) == 2
    torch.testing.assert_close(files.read("a", names[0]), STATE, rtol=0, atol=0)


def test_clients_with_the_same_state_are_apart(files: StateFiles) -> None:
    name = files.write("0", STATE)
    assert files.write(0, STATE) == name
    files.remove(0, name)
    torch.testing.assert_close(files.read("0", name), STATE, rtol=0, atol=0)


@pytest.mark.parametrize("value", [1.0, [torch.ones(1)], None], ids=repr)
def test_only_tensors_can_be_written(files: StateFiles, value: Any) -> None:
    with pytest.raises(TypeError, match=f"holds a {type(value).__name__} as 'count'; it may hold tensors only"):
        files.write("a", {"algorithm": {"count": value}})
    assert not files.root.exists()


def test_a_version_that_is_gone_is_an_error_with_the_remedy(files: StateFiles) -> None:
    with pytest.raises(FileNotFoundError, match=r"state of client 'a' is not at .*copy it along with the checkpoint"):
        files.read("a", "0" * 32)


def test_a_version_taken_from_another_folder_is_independent_of_it(files: StateFiles, tmp_path: Path) -> None:
    other = StateFiles(tmp_path / "other")
    name = other.write("a", STATE)
    for _ in range(2):
        files.copy_from(other, "a", name)
    other.remove("a", name)
    torch.testing.assert_close(files.read("a", name), STATE, rtol=0, atol=0)


@pytest.mark.parametrize("manifest", [{}, {"a": "x", 0: "y", "0": "z"}])
def test_a_manifest_comes_back_as_it_was(files: StateFiles, manifest: dict[int | str, str]) -> None:
    name = files.write_manifest(manifest)
    assert files.read_manifest(name) == manifest
    assert files.write_manifest(dict(reversed(manifest.items()))) == name
    assert files.read_manifest("0" * 32) is None


def test_what_no_checkpoint_names_is_removed(files: StateFiles) -> None:
    versions = [files.write(client, state) for client, state in (("a", STATE), ("a", OTHER), ("b", STATE))]
    first = files.write_manifest({"a": versions[0], "b": versions[2]})
    second = files.write_manifest({"a": versions[1], "b": versions[2]})
    files.name("first.ckpt", [first], also_old=False)
    files.name("second.ckpt", [second], also_old=False)
    files.collect()
    assert num_versions(files) == 3
    files.forget("first.ckpt")
    files.collect()
    assert files.read_manifest(first) is None
    torch.testing.assert_close(files.read("a", versions[1]), OTHER, rtol=0, atol=0)
    assert num_versions(files) == 2
    files.forget("second.ckpt")
    files.collect()
    assert num_versions(files) == 0
    assert list((files.root / "versions").iterdir()) == []


@pytest.mark.parametrize(("also_old", "kept"), [(True, 2), (False, 1)])
def test_a_checkpoint_keeps_its_old_versions_until_it_is_written_anew(
    files: StateFiles, also_old: bool, kept: int
) -> None:
    for state in (STATE, OTHER):
        manifest = files.write_manifest({"a": files.write("a", state)})
        files.name("last.ckpt", [manifest], also_old=also_old)
    files.collect()
    assert num_versions(files) == kept


def test_forgetting_an_unknown_checkpoint_and_collecting_an_empty_folder_do_nothing(files: StateFiles) -> None:
    files.forget("none.ckpt")
    files.collect()
    assert not files.root.exists()


def test_nothing_unfinished_is_left(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write("a", STATE)
    assert [path for path in files.root.rglob("*") if path.is_file()] == []
