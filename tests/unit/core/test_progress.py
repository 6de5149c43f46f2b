"""Progress that reads well in a log: plain lines, written immediately, not too many."""

import io
import os
import re
import subprocess
import sys

import pytest

from components.core import progress
from components.core.progress import clock, log, log_perplexity, track

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def slow_clock(monkeypatch):
    """A clock that advances only when the test sets it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_items_come_through_in_order(capsys):
    items = [object() for _ in range(5)]
    assert list(track(iter(items), "work", 5)) == items
    assert list(track([], "work", 0)) == []


def test_a_log_gets_plain_lines_with_the_time_left(capsys, slow_clock):
    for _ in track(range(4), "pruning blocks", 4):
        slow_clock[0] += 15
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "pruning blocks: 1/4, 00:15 spent, 00:45 left",
        "pruning blocks: 2/4, 00:30 spent, 00:30 left",
        "pruning blocks: 3/4, 00:45 spent, 00:15 left",
        "pruning blocks: 4/4, 01:00 spent, 00:00 left",
    ]
    assert not CONTROL.search(out)
    assert err == ""


def test_fast_work_gets_a_line_now_and_then_and_one_at_the_end(capsys, slow_clock):
    for _ in track(range(100), "work", 100):
        slow_clock[0] += 0.25
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["work: 40/100", "work: 80/100", "work: 100/100"]


def test_a_note_is_asked_for_only_with_each_line(capsys, slow_clock):
    asked = []

    def note() -> str:
        asked.append(None)
        return f"loss {len(asked)}"

    for _ in track(range(40), "distilling", 40, note):
        slow_clock[0] += 0.5
    assert capsys.readouterr().out.splitlines() == [
        "distilling: 20/40, 00:10 spent, 00:10 left; loss 1",
        "distilling: 40/40, 00:20 spent, 00:00 left; loss 2",
    ]
    assert len(asked) == 2


def test_work_that_ends_early_or_fails_goes_on_to_the_caller(capsys):
    def failing():
        yield 1
        raise ValueError("no")

    tracked = track(failing(), "work", 5)
    assert next(tracked) == 1
    with pytest.raises(ValueError, match="^no$"):
        next(tracked)
    assert list(track(range(2), "work", 5)) == [0, 1]
    assert list(zip(range(2), track(range(9), "work", 9), strict=False)) == [(0, 0), (1, 1)]


def test_a_terminal_gets_a_bar_with_count_time_left_and_note(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(range(3), "pruning blocks", 3, lambda: "loss 1.5")) == [0, 1, 2]
    shown = terminal.getvalue()
    assert "pruning blocks" in shown
    assert "0/3" in shown
    assert "\r" in shown
    assert capsys.readouterr().out == ""


def test_lines_appear_at_once_in_a_pipe():
    """A pod's log is a pipe: lines must be visible while the work is still running."""
    code = "from components.core.progress import log; log('[PPL] x=1'); import os; os._exit(0)"  # no flush at exit
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert (run.stdout, run.stderr) == ("[PPL] x=1\n", "")


def test_perplexity_lines_are_kept_to_the_letter(capsys):
    log_perplexity("before_pruning", 29.60176)
    log_perplexity("eval_ppl", 30, prefix="epoch=1 ")
    log("plain")
    assert capsys.readouterr().out == "[PPL] before_pruning=29.6018\n[PPL] epoch=1 eval_ppl=30.0000\nplain\n"


def test_clock():
    assert [clock(0), clock(59.9), clock(61), clock(3723)] == ["00:00", "00:59", "01:01", "1:02:03"]


def test_of_several_processes_the_first_prints_and_another_only_what_it_alone_knows(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    log("known to all")
    log("known to one", by_any=True)
    assert capsys.readouterr().out == "known to one\n"
