"""MLflow's own pages on a made-up sweep, as `safecl ui` opens them, in a real browser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safecl.cli import main
from tests import test_logbook
from tests.browser import browser, program


def test_nothing_tracked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["safecl", "ui", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "nothing was tracked yet" in capsys.readouterr().err


@pytest.mark.slow
def test_the_runs_table_shows_names_and_columns_that_people_know(tmp_path: Path) -> None:
    program()
    root = tmp_path / "runs"
    test_logbook.run(test_logbook.project(root))
    command = [sys.executable, "-m", "safecl.cli", "ui", "--root", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        [address] = re.findall(r"MLflow: (\S+)", said)
        assert address.startswith("http://127.0.0.1:") and address.endswith("&viewStateShareKey=safecl")
        with browser(tmp_path) as web:
            web.size(1600)
            web.open(address)
            web.wait("document.body.innerText.includes('sft · mini p=.1')", 120)
            shown = web.js("document.body.innerText")
            for column in ("asr", "over_refusal", "utility", "method"):
                assert column in shown, column
            assert "base · mini" in shown and "seed 0" not in shown, "the rows of the table"
            if kept := os.environ.get("SAFECL_PICTURES"):  # a folder: to look at what a reader sees
                web.picture(Path(kept) / "mlflow-runs.png")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    listening = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(root) not in "".join(line for line in listening.splitlines() if "mlflow" in line)
