from __future__ import annotations

import re
import time

import pytest

from wavprune.common import progress


def test_a_log_gets_lines_with_an_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with progress.progress_lines("sweep", 1200, "runs") as advance:
        time.sleep(0.12)
        advance(300)
        time.sleep(0.12)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "sweep: 0 of 1,200 runs in 0:00:00"
    end = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"sweep: 300 of 1,200 runs in 0:00:00, 0:00:01 left, until {end}", last)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_what_takes_less_than_half_a_minute_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.progress_lines("sweep", 2, "runs") as advance:
        advance(2)
    assert capsys.readouterr().err == ""
