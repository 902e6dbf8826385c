"""`safecl ui` where there is nothing to show. What it shows of a real sweep: test_end_to_end.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecl.cli import main


def test_nothing_tracked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["safecl", "ui", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "nothing was tracked yet" in capsys.readouterr().err
