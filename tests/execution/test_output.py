"""What nobody can read any more: a full disk, a closed pipe, a terminal that is gone. The work goes on."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from icl.execution import progress
from icl.execution.local import LocalProcess
from icl.execution.output import Forgiving, copied_to
from icl.execution.progress import progress_bar
from icl.execution.schedule import Ended


class Refusing(io.StringIO):
    """A stream on which every write ends in an error."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "full"), BrokenPipeError(), OSError(5, "gone"), ValueError("closed")])
def test_what_cannot_be_written_is_dropped(error):
    stream = Forgiving(Refusing(error))
    print("a", file=stream, flush=True)
    assert stream.failure is None


def test_what_is_printed_is_also_kept_with_the_error_that_ends_it(tmp_path, capsys):
    log = tmp_path / "run" / "output.log"

    def work(number: int) -> None:
        print("a result", number)
        print("λ̂ so far", file=sys.stderr)
        raise ValueError("the end")

    for number in (1, 2):
        with pytest.raises(ValueError, match="the end"), copied_to(log):
            work(number)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a result 1\na result 2\n", "λ̂ so far\n" * 2)
    assert log.read_text() == "".join(f"a result {number}\nλ̂ so far\nicl: the end\n" for number in (1, 2))


def test_a_log_on_a_full_disk_costs_nothing_that_is_printed(capsys):
    with copied_to(Path("/dev/full")):
        print("a result")
    assert capsys.readouterr().out == "a result\n"


def test_results_on_a_full_disk_are_missed_but_not_those_nobody_wants():
    for error, missed in ((OSError(28, "full"), True), (BrokenPipeError(), False)):
        stream = Forgiving(Refusing(error), BrokenPipeError)
        print("a", file=stream, flush=True)
        assert (stream.failure is not None) is missed


def test_what_can_be_written_is_whatever_its_encoding():
    raw = io.BytesIO()
    stream = Forgiving(io.TextIOWrapper(raw, encoding="ascii"))
    print("loss ±1", file=stream, flush=True)
    assert raw.getvalue() == b"loss \\xb11\n"
    assert (stream.encoding, stream.isatty(), stream.errors) == ("ascii", False, "strict")


def test_a_program_without_a_terminal_prints_nothing():
    stream = Forgiving(None)
    print("a", file=stream, flush=True)
    assert not stream.isatty()
    with pytest.raises(OSError, match="fileno"):
        stream.fileno()


def test_progress_that_cannot_be_printed_is_none(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress_bar("a", 3, Console(file=Refusing(OSError(28, "full")))) as update:
        for done in range(4):
            update(done)


MAIN = "import sys; from icl.cli import main; sys.argv = ['icl', {!r}]; main()"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk here")
def test_results_that_were_lost_are_a_failure_and_lost_messages_are_not():
    with open("/dev/full", "w") as full:
        lost = subprocess.run(
            [sys.executable, "-c", MAIN.format("--version")], stdout=full, stderr=subprocess.PIPE, text=True
        )
        refused = subprocess.run([sys.executable, "-c", MAIN.format("trian")], stdout=full, stderr=full)
    assert lost.returncode == 1
    assert lost.stderr.startswith("icl: the results could not be written")
    assert len(lost.stderr.splitlines()) == 1
    assert refused.returncode == 2


@pytest.mark.parametrize("obstacle", ["folder", "pipe", "file in the way", "link"])
def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, obstacle, caplog):
    log = tmp_path / "run" / "output.log"
    if obstacle == "file in the way":
        log.parent.touch()
    else:
        log.parent.mkdir()
        {"folder": log.mkdir, "pipe": lambda: os.mkfifo(log), "link": lambda: log.symlink_to(tmp_path / "other")}[
            obstacle
        ]()
    running = LocalProcess([sys.executable, "-c", "print('x: 3/7'); print('y' * 10**6)"], log, dict(os.environ))
    while (ended := running.poll()) is None:
        time.sleep(0.01)
    assert ended == Ended(True)
    assert running.note() == "3/7"
    (record,) = caplog.records
    assert str(log) in record.getMessage()
    assert not (tmp_path / "other").exists()
