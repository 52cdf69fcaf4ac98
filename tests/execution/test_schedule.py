import io
import itertools
import os
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from icl.execution.display import headline, runs_display, runs_table
from icl.execution.local import LocalProcess
from icl.execution.schedule import Ended, ScheduledRun, State, run_all, seconds_left


class Scripted:
    """A run that lasts a number of polls and then ends as told; it counts how many run at once."""

    active = 0
    most = 0

    def __init__(self, polls: int, ended: Ended) -> None:
        self.polls, self.ended, self.asked = polls, ended, 0
        Scripted.active += 1
        Scripted.most = max(Scripted.most, Scripted.active)

    def poll(self):
        self.polls -= 1
        if self.polls > 0:
            return None
        Scripted.active -= 1
        return self.ended

    def note(self):
        return "1/2"

    def stop(self):
        self.asked += 1
        self.polls = 1

    def kill(self):
        self.polls = 0


@pytest.fixture(autouse=True)
def fast_and_fresh(monkeypatch):
    monkeypatch.setattr("icl.execution.schedule.POLL_S", 0.001)
    Scripted.active = Scripted.most = 0


def runs_of(count):
    return [ScheduledRun(f"run-{index}", index) for index in range(count)]


@pytest.mark.parametrize(("count", "jobs"), list(itertools.product([1, 2, 7], [1, 3])))
def test_everything_runs_once_and_never_more_than_jobs_at_a_time(count, jobs):
    runs, started = runs_of(count), []

    def launch(run):
        started.append(run.index)
        return Scripted(run.index % 3 + 1, Ended(True))

    assert run_all(runs, launch, jobs)
    assert started == list(range(count))
    assert Scripted.most == min(count, jobs)
    assert {run.state for run in runs} == {State.DONE}


def test_a_failing_run_stops_no_other_and_is_named_with_its_reason():
    runs = runs_of(5)
    bad = {1: Ended(False, "no memory"), 3: Ended(False, "bad luck")}
    assert not run_all(runs, lambda run: Scripted(2, bad.get(run.index, Ended(True))), 2)
    assert [run.state for run in runs] == [State.DONE, State.FAILED, State.DONE, State.FAILED, State.DONE]
    assert [run.reason for run in runs] == ["", "no memory", "", "bad luck", ""]


def test_a_run_that_cannot_start_fails_alone():
    def launch(run):
        if run.index == 0:
            raise OSError("no such program")
        return Scripted(1, Ended(True))

    runs = runs_of(2)
    assert not run_all(runs, launch, 1)
    assert [(run.state, run.reason) for run in runs] == [(State.FAILED, "no such program"), (State.DONE, "")]


def test_what_is_done_is_not_run_again():
    runs = runs_of(3)
    runs[1].state = State.SKIPPED
    started = []

    def launch(run):
        started.append(run.index)
        return Scripted(1, Ended(True))

    assert run_all(runs, launch, 2)
    assert started == [0, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_running_ones_and_starts_no_other(number):
    runs, launched = runs_of(4), []

    def launch(run):
        launched.append(Scripted(10**9, Ended(False, "interrupted")))
        if len(launched) == 2:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        return launched[-1]

    before = signal.getsignal(number)
    assert not run_all(runs, launch, 2)
    assert signal.getsignal(number) is before
    assert [run.state for run in runs] == [State.STOPPED, State.STOPPED, State.WAITING, State.WAITING]
    assert [one.asked for one in launched] == [1, 1]


def test_who_does_not_listen_is_told_again_and_then_ended(monkeypatch):
    monkeypatch.setattr("icl.execution.schedule.TELL_AGAIN_S", 0.05)
    monkeypatch.setattr("icl.execution.schedule.END_S", 0.1)

    class Deaf(Scripted):
        def stop(self):
            self.asked += 1

    deaf = Deaf(10**9, Ended(False, "ended by SIGKILL"))

    def launch(run):
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        return deaf

    assert not run_all(runs_of(1), launch, 1)
    assert deaf.asked == 2


def test_a_persons_second_ctrl_c_ends_who_does_not_listen(monkeypatch):
    monkeypatch.setattr("icl.execution.signals.PATIENCE_S", 0.05)
    monkeypatch.setattr("icl.execution.schedule.END_S", 60.05)

    class Deaf(Scripted):
        def stop(self):
            self.asked += 1

    deaf = Deaf(10**9, Ended(False, "ended by SIGKILL"))

    def launch(run):
        for delay, number in (
            (0.02, signal.SIGINT),
            (0.04, signal.SIGTERM),
            (0.2, signal.SIGTERM),
            (0.3, signal.SIGINT),
        ):
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        return deaf

    began = time.monotonic()
    assert not run_all(runs_of(1), launch, 1)
    assert deaf.asked == 2
    assert time.monotonic() - began > 0.3


def test_time_left_is_the_mean_length_of_what_is_done():
    runs = runs_of(5)
    assert seconds_left(runs, 2) is None
    for run, state, seconds in zip(runs, [State.DONE, State.DONE, State.RUNNING], [8.0, 12.0, 4.0], strict=False):
        run.state, run.seconds = state, seconds
    # 6 s of the running one and 2 x 10 s of the waiting ones, two at a time.
    assert seconds_left(runs, 2) == pytest.approx(13.0)
    assert headline(runs, 2) == "2 waiting, 1 running, 2 done; about 0:00:13 left"


def test_the_table_shows_what_matters_where_there_is_no_room_for_all():
    runs = runs_of(100)
    runs[50].state, runs[50].reason = State.FAILED, "[red]no memory"
    runs[70].state, runs[70].note = State.RUNNING, "3/7, 5 s left"
    console = Console(width=100, file=io.StringIO())
    console.print(runs_table(runs, 2, 5))
    text = console.file.getvalue()
    assert "[red]no memory" in text
    assert "3/7, 5 s left" in text
    assert text.count("run-") == 5


def test_the_table_has_no_column_for_remarks_if_there_are_none():
    runs = runs_of(2)
    assert len(runs_table(runs, 2, None).columns) == 4
    runs[1].state, runs[1].reason = State.FAILED, "no memory"
    assert len(runs_table(runs, 2, None).columns) == 5


def test_away_from_a_terminal_each_event_is_a_line_and_the_end_a_table(capsys):
    runs = runs_of(2)
    bad = {1: Ended(False, "no memory")}
    with runs_display(1, Console(width=100)) as show:
        run_all(runs, lambda run: Scripted(2, bad.get(run.index, Ended(True))), 1, show)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["[0] run-0 running", "[0] run-0 done", "[1] run-1 running", "[1] run-1 failed: no memory"]
    assert lines[-1].strip() == "1 done, 1 failed"


def process(code, log):
    return LocalProcess([sys.executable, "-c", code], log, dict(os.environ))


def end_of(running):
    while (ended := running.poll()) is None:
        time.sleep(0.01)
    return ended


def test_a_processs_last_line_is_its_reason_and_all_it_said_is_kept(tmp_path):
    log = tmp_path / "run" / "output.log"
    assert end_of(process("print('x: 3/7, 5 s left loss 0.5')", log)) == Ended(True)
    failed = process(
        "import sys; print('icl: no memory', file=sys.stderr); print('bye', file=sys.stderr); sys.exit(1)", log
    )
    assert end_of(failed) == Ended(False, "no memory")
    assert end_of(process("raise KeyError('x')", log)) == Ended(False, "KeyError: 'x'")
    assert end_of(process("import os; os.kill(os.getpid(), 9)", log)) == Ended(False, "ended by SIGKILL")
    assert log.read_text().splitlines()[:3] == ["x: 3/7, 5 s left loss 0.5", "icl: no memory", "bye"]


def test_progress_and_stopping_of_a_process(tmp_path):
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *a: sys.exit(1))
print('run-a: 3/7, 5 s left loss 0.5', flush=True)
time.sleep(60)
"""
    running = process(code, tmp_path / "output.log")
    while not running.note():
        time.sleep(0.01)
    assert running.note() == "3/7, 5 s left loss 0.5"
    running.stop()
    assert end_of(running) == Ended(False, "run-a: 3/7, 5 s left loss 0.5")
