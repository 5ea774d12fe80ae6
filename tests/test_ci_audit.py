"""`.ci/audit` tells an all-clear from a service that gave no answer, over pip-audit itself."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from chat_server import send, start

AUDIT = Path(__file__).parents[1] / ".ci" / "audit"
FLAW = {
    "id": "PYSEC-2026-1",
    "aliases": ["CVE-2026-1"],
    "summary": "a flaw",
    "modified": "2026-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"name": "pip-audit", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]}],
        }
    ],
}

needs_pip_audit = pytest.mark.skipif(
    shutil.which("pip-audit") is None, reason="pip-audit isn't installed"
)


def audit(url: str, **environment: str) -> str:
    """Return the last line that the script prints."""
    done = subprocess.run(
        ["bash", str(AUDIT)], env={**os.environ, "OSV_URL": url, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def audit_with(answer: Callable[[str], Any]) -> str:
    """Audit with a server in the form of OSV's API; `answer(package)` is a body or a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = answer(asked["package"]["name"])
            is_status = isinstance(found, int)
            send(
                self, b"" if is_status else json.dumps(found).encode(), found if is_status else 200
            )

        def log_message(self, *args: Any) -> None:
            pass

    url, stop = start(Handler)
    try:
        return audit(f"{url}/v1/query")
    finally:
        stop()


@needs_pip_audit
@pytest.mark.slow
def test_what_is_known_of_packages_is_listed_and_no_fault() -> None:
    printed = audit_with(lambda name: {"vulns": [FLAW]} if name == "pip-audit" else {})
    assert "pip-audit 2." in printed
    assert "PYSEC-2026-1 (CVE-2026-1), fixed in 999\n1 known vulnerabilities in" in printed
    assert "\nno known vulnerabilities in" in "\n" + audit_with(lambda name: {})


@needs_pip_audit
@pytest.mark.slow
def test_a_service_without_a_whole_answer_is_no_all_clear() -> None:
    assert "gave no whole answer" in audit_with(lambda name: 500 if name > "pip-a" else {})
    assert "gave no whole answer" in audit("http://127.0.0.1:9/v1/query")


def test_a_service_that_knows_no_package_is_no_all_clear(tmp_path) -> None:
    """As PyPI's mirrors that lack the JSON API: pip-audit ends well, and has skipped everything."""
    reason = "Dependency not found on PyPI and could not be audited: pip (1.0)"
    report = json.dumps({"dependencies": [{"name": "pip", "skip_reason": reason}], "fixes": []})
    stand_in = tmp_path / "pip-audit"
    stand_in.write_text(
        f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'w').write({report!r})\n"
    )
    stand_in.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    assert audit("", PATH=path) == "not audited: the service knows none of 1 packages\n"


def test_a_missing_pip_audit_is_said(tmp_path) -> None:
    (tmp_path / "bash").symlink_to(str(shutil.which("bash")))
    assert audit("", PATH=str(tmp_path)) == "not audited: pip-audit isn't installed\n"
