"""A scanner of TLS servers looks at the coordinator's port."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import PATIENCE
from tests.helpers.network import HOST, live_coordinator, make_kits, rules, settings

SSLYZE = "sslyze==6.3.1"


@pytest.fixture
def sslyze(tmp_path: Path) -> Path:
    """sslyze in an environment of its own, since it pins libraries that the coordinator uses too."""
    own = tmp_path / "sslyze"
    subprocess.run([sys.executable, "-m", "venv", own], check=True, timeout=PATIENCE)
    subprocess.run([own / "bin" / "python", "-m", "pip", "install", "-q", SSLYZE], check=True, timeout=2 * PATIENCE)
    return own / "bin" / "python"


def scan(python: Path, folder: Path, port: int) -> dict[str, Any]:
    kit, report = folder / "east", folder / "scan.json"
    words = ["--cert", kit / "cert.pem", "--key", kit / "key.pem", "--json_out", report]
    # It ends with 1 where a server is not as Mozilla wants it, as those of a private authority never are.
    subprocess.run([python, "-m", "sslyze", f"{HOST}:{port}", *words], timeout=PATIENCE, check=False)
    (found,) = json.loads(report.read_text())["server_scan_results"]
    results: dict[str, Any] = found["scan_result"]
    return {name: result["result"] for name, result in results.items()}


@pytest.mark.slow
def test_sslyze_finds_nothing_but_tls_1_3(tmp_path: Path, sslyze: Path) -> None:
    make_kits(tmp_path)
    with live_coordinator(tmp_path, rules(), settings()) as live:
        found = scan(sslyze, tmp_path, live.port)
        assert live.events("connection refused")
    accepted = {name: len(found[f"{name}_cipher_suites"]["accepted_cipher_suites"]) for name in VERSIONS}
    assert accepted == {**dict.fromkeys(VERSIONS, 0), "tls_1_3": 3}
    assert not found["heartbleed"]["is_vulnerable_to_heartbleed"]
    assert not found["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"]
    assert not found["tls_compression"]["supports_compression"]
    assert not found["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"]
    assert found["robot"]["robot_result"].startswith("NOT_VULNERABLE")


VERSIONS = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3")
