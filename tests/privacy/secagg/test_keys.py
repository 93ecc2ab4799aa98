"""Key files and ``lightning-fl keys``; secrets that can't be copied."""

from __future__ import annotations

import copy
import os
import pickle
import stat
from pathlib import Path

import pytest

from lightning_fl.cli import main
from lightning_fl.communication import LocalGroup
from lightning_fl.privacy.secagg.keys import KeyFolder, PublicIdentity
from lightning_fl.privacy.secagg.packing import Ranges
from lightning_fl.privacy.secagg.primitives import AgreementKey, SigningKey
from lightning_fl.privacy.secagg.session import Session, open_session


def run(*words: str) -> None:
    main(["keys", *words])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_create_show_and_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for silo in "abc":
        run("create", str(tmp_path / silo), "--name", f"hospital {silo}")
    created = capsys.readouterr().out
    assert created.count("lightning-fl-ed25519 ") == created.count("fingerprint ") == 3
    run("trust", str(tmp_path / "a"), *(str(tmp_path / silo / "identity.pub") for silo in "abc"))
    told = capsys.readouterr().out
    assert "hospital b" in told
    assert "hospital a" not in told
    run("trust", str(tmp_path / "a"), (tmp_path / "b" / "identity.pub").read_text())
    assert "trusted already" in capsys.readouterr().out
    run("show", str(tmp_path / "a"))
    shown = capsys.readouterr().out
    assert [name in shown for name in ("hospital a", "trusts lightning-fl-ed25519", "hospital c")] == [True] * 3
    assert mode(tmp_path / "a" / "identity.key") == mode(tmp_path / "a" / "trusted") == 0o600
    assert mode(tmp_path / "a") == 0o700
    secret = (tmp_path / "a" / "identity.key").read_text().strip()
    assert secret not in created + told + shown


def test_an_identity_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("create", str(tmp_path))
    before = (tmp_path / "identity.key").read_bytes()
    with pytest.raises(SystemExit) as error:
        run("create", str(tmp_path))
    assert error.value.code == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "identity.key").read_bytes() == before


@pytest.mark.parametrize("words", [("show", "nowhere"), ("trust", "nowhere", "nothing.pub")])
def test_a_folder_without_identity(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*words)
    assert "error" in capsys.readouterr().err
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAA x", "lightning-fl-ed25519 AAAA x", "lightning-fl-ed25519 !!!"])
def test_lines_that_are_no_public_keys(line: str) -> None:
    with pytest.raises(ValueError, match="is not a public key"):
        PublicIdentity.parse(line)


def test_files_that_others_may_read_are_refused(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path)
    folder.create()
    folder.trust([PublicIdentity(SigningKey().public, "other")])
    (tmp_path / "identity.key").chmod(0o640)
    with pytest.raises(ValueError, match=r"mode 0640.*chmod 600"):
        folder.identity()
    (tmp_path / "identity.key").chmod(0o600)
    (tmp_path / "trusted").chmod(0o622)
    with pytest.raises(ValueError, match=r"mode 0622.*chmod 600"):
        folder.trusted()


def test_a_damaged_identity_is_refused(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path)
    folder.create()
    (tmp_path / "identity.key").write_text("AAAA\n")
    with pytest.raises(ValueError, match="holds no identity"):
        folder.identity()


def test_secrets_are_neither_pickled_copied_nor_shown(tmp_path: Path) -> None:
    session = open_session(LocalGroup(), silos=False, keys=None, ranges=Ranges(16.0, 1024.0, 1.0, 32))
    assert isinstance(session, Session)
    for secret in (SigningKey(bytes(32)), AgreementKey(bytes([64] * 32)), session):
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="holds a secret"):
                copied(secret)
        assert repr(secret) == f"<{type(secret).__name__}, secret>"


def test_of_two_that_create_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that there is no identity."""
    folder = KeyFolder(tmp_path / "silo")
    monkeypatch.setattr(KeyFolder, "exists", lambda self: False)
    first = folder.create("first")
    with pytest.raises(ValueError, match="was just created by another process"):
        folder.create("second")
    assert folder.identity().public == first.key
    assert PublicIdentity.parse((tmp_path / "silo" / "identity.pub").read_text()) == first
    assert sorted(path.name for path in (tmp_path / "silo").iterdir()) == ["identity.key", "identity.pub"]


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path / "silo")
    folder.create()
    folder.trust([PublicIdentity(SigningKey().public, "other")])
    for wrong in (0o777, 0o720):
        (tmp_path / "silo").chmod(wrong)
        for use in (folder.identity, folder.trusted):
            with pytest.raises(ValueError, match="others on this machine can put files into it"):
                use()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ValueError, match="chmod 700"):
        KeyFolder(tmp_path / "open").create()
    assert not list((tmp_path / "open").iterdir())


def test_somebody_elses_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = KeyFolder(tmp_path / "silo")
    folder.create()
    if os.geteuid() == 0:
        os.chown(tmp_path / "silo", 4321, -1)
    else:
        monkeypatch.setattr("os.geteuid", lambda: 4321)
    with pytest.raises(ValueError, match="belongs to user"):
        folder.identity()


def test_a_name_draws_nothing_over_the_fingerprint() -> None:
    line = str(PublicIdentity(SigningKey().public, "hospital-b\x1b[E    fingerprint 0123\x1b[8m"))
    assert PublicIdentity.parse(line).name == "hospital-b[E    fingerprint 0123[8m"


def test_a_fingerprint_has_128_bits() -> None:
    assert len(PublicIdentity(SigningKey().public).fingerprint) == 32
