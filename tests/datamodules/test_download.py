from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pooch
import pytest

from lightning_fl.datamodules.download import DownloadError, RemoteFile, download
from tests.helpers.data_files import Server, serve

CONTENT = bytes(range(256)) * 1000

# Imported before the tests and quiet: its log handler would keep the stderr of the test that imports it first.
pooch.get_logger().setLevel("WARNING")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as state:
        state.files["data.bin"] = CONTENT
        yield state


def remote(server: Server, content: bytes = CONTENT, name: str = "data.bin") -> RemoteFile:
    return RemoteFile(name, f"{server.url}/{name}", len(content), hashlib.sha256(content).hexdigest())


def names(folder: Path) -> list[str]:
    """The files of a folder besides the lock, which stays."""
    return [file.name for file in folder.iterdir() if file.name != ".download.lock"]


def test_says_what_and_how_large_and_leaves_the_file(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = download("Numbers", [remote(server)], tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["data.bin"]
    stderr = capsys.readouterr().err
    assert "Downloading Numbers: 1 file(s), 0.3 MB, to" in stderr
    assert "data.bin" in stderr


def test_what_is_there_is_not_downloaded(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.bin").write_bytes(b"mine")
    download("Numbers", [remote(server)], tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"
    assert server.requests == []
    assert capsys.readouterr().err == ""


def test_pooch_is_needed_only_to_download(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r'Numbers needs pooch: pip install "lightning-fl\[data\]".*by hand'):
        download("Numbers", [remote(server)], tmp_path)
    (tmp_path / "data.bin").write_bytes(b"mine")
    assert download("Numbers", [remote(server)], tmp_path) == [tmp_path / "data.bin"]
    assert server.requests == []


def test_a_broken_connection_leaves_nothing_and_the_next_call_downloads_all(server: Server, tmp_path: Path) -> None:
    server.break_after = 100_000
    with pytest.raises(DownloadError, match=r"could not be downloaded .* Nothing was saved. Try again, or put"):
        download("Numbers", [remote(server)], tmp_path, retries=0)
    assert names(tmp_path) == []
    download("Numbers", [remote(server)], tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["data.bin"]


def test_a_broken_connection_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.break_after = 100_000
    download("Numbers", [remote(server)], tmp_path, retries=1)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["data.bin"]
    assert len(server.requests) == 2


@pytest.mark.parametrize("wrong", [b"x" * len(CONTENT), CONTENT + b"more"], ids=["other bytes", "too many"])
def test_a_file_that_is_not_the_one_expected_is_removed(server: Server, tmp_path: Path, wrong: bytes) -> None:
    server.files["data.bin"] = wrong
    found = hashlib.sha256(wrong).hexdigest()
    with pytest.raises(DownloadError, match=rf"does not match the known hash: .* but got {found}.*Nothing was"):
        download("Numbers", [remote(server)], tmp_path, retries=0)
    assert names(tmp_path) == []


def test_a_server_that_does_not_have_the_file(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"other.bin could not be downloaded .404 .*put other.bin into"):
        download("Numbers", [remote(server, name="other.bin")], tmp_path, retries=0)
    assert names(tmp_path) == []


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with serve() as gone:
        pass
    with pytest.raises(DownloadError, match="could not be downloaded"):
        download("Numbers", [remote(gone)], tmp_path, retries=0)
    assert names(tmp_path) == []


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that interrupt each other at nearly every line."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_several_at_once_download_once(server: Server, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(10)]
    for folder in folders:
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(download, "Numbers", [remote(server)], folder) for _ in range(8)]
            assert {job.result()[0].read_bytes() for job in jobs} == {CONTENT}
        assert names(folder) == ["data.bin"]
    assert len(server.requests) == len(folders)
