from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_fl.datamodules.download import DownloadError, RemoteFile, download
from tests.helpers.data_files import Server, serve

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as state:
        state.files["data.bin"] = CONTENT
        yield state


def remote(server: Server, content: bytes = CONTENT, name: str = "data.bin") -> RemoteFile:
    return RemoteFile(name, f"{server.url}/{name}", len(content), hashlib.sha256(content).hexdigest())


def test_says_what_and_how_large_and_leaves_the_file(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = download("Numbers", [remote(server)], tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["data.bin"]
    said = capsys.readouterr().err
    assert "Downloading Numbers: 1 file(s), 0.3 MB, into" in said
    assert "data.bin" in said


def test_what_is_there_is_not_downloaded(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.bin").write_bytes(b"mine")
    download("Numbers", [remote(server)], tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"
    assert server.requests == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ranges", [True, False], ids=["server resumes", "server starts anew"])
def test_goes_on_where_a_connection_broke(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.break_after = ranges, 100_000
    with pytest.raises(DownloadError, match=r"100000 of 256000 bytes are kept in .*data.bin.part; try again to go on"):
        download("Numbers", [remote(server)], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["data.bin.part"]
    download("Numbers", [remote(server)], tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == ["data.bin"]
    assert server.requests == [("data.bin", None), ("data.bin", "bytes=100000-")]


@pytest.mark.parametrize("wrong", [b"x" * len(CONTENT), CONTENT + b"more"], ids=["other bytes", "too many"])
def test_a_file_that_is_not_the_one_expected_is_removed(server: Server, tmp_path: Path, wrong: bytes) -> None:
    server.files["data.bin"] = wrong
    with pytest.raises(DownloadError, match=r"is not the file expected: .* expected 256000 bytes .* It was removed"):
        download("Numbers", [remote(server)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rubbish_kept_from_before_is_found_out(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="is not the file expected"):
        download("Numbers", [remote(server)], tmp_path)
    download("Numbers", [remote(server)], tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_server_that_does_not_have_the_file(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"other.bin could not be downloaded: HTTP Error 404.*put the file into"):
        download("Numbers", [remote(server, name="other.bin")], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with serve() as gone:
        pass
    with pytest.raises(DownloadError, match="could not be downloaded"):
        download("Numbers", [remote(gone)], tmp_path)
    assert list(tmp_path.iterdir()) == []


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
        assert [file.name for file in folder.iterdir()] == ["data.bin"]
    assert len(server.requests) == len(folders)
