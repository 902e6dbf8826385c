"""`safecl ui` where there is nothing to show. What it shows of a real sweep: test_end_to_end.py."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import psutil
import pytest

from safecl.cli import main
from safecl.tracking import ui


def test_nothing_tracked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["safecl", "ui", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "nothing was tracked yet" in capsys.readouterr().err


# In place of optuna-dashboard, which is no dependency: its `run_server`, answering with the studies' URI.
DASHBOARD = """
import http.server

def run_server(storage, host, port):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(storage.encode())

    http.server.HTTPServer((host, port), Handler).serve_forever()
"""


def test_the_dashboard_gets_the_studies_uri_where_other_users_cannot_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optuna_dashboard.py").write_text(DASHBOARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    uri = "postgresql://somebody:secret@nowhere/studies"
    with ui.dashboard(uri, tmp_path / "logs") as address:
        assert address is not None
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert answer.read().decode() == uri
        lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
        assert any("optuna_dashboard" in line for line in lines) and not any("secret" in line for line in lines)
