"""Requests to stop: who may send what, how often, and when it means at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from icl.execution import signals
from icl.execution.signals import AGAIN, status_of_stop, stop_requests, stop_signal

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2]


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def heard():
    """No signal is ignored, also where the tests run under nohup."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
def test_work_saves_and_ends_at_every_signal_that_asks_for_it(number):
    before = signal.getsignal(number)
    with stop_signal() as stopped:
        assert not stopped()
        send(number)
        assert stopped()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", ALL)
def test_what_has_not_begun_ends_at_the_first_signal(number):
    def wait():
        send(number)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt), stop_signal():
        wait()


def test_a_second_signal_does_not_disturb_the_way_out():
    left = []

    def prepare():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            left.append("in order")

    with pytest.raises(KeyboardInterrupt), stop_signal():
        prepare()
    assert left == ["in order"]


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
def test_two_signals_at_once_are_no_impatience(first, second):
    with stop_signal() as stopped:
        assert not stopped()
        for number in (first, second, second):
            send(number)
        assert stopped()


def test_only_a_persons_second_ctrl_c_means_at_once(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_S", 0.05)
    with stop_signal() as stopped:
        assert not stopped()
        for number in (signal.SIGTERM, signal.SIGINT):  # a scheduler, and the sweep that started this run
            send(number)
        time.sleep(0.1)
        for number in ALL[1:]:  # the scheduler again, a CPU limit that warns every second
            send(number)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", ALL[2:])
def test_who_is_told_to_ignore_a_signal_ignores_it(number):
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signal() as stopped:
            assert not stopped()
            send(number)
            assert not stopped()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_thread_that_cannot_listen_works_without():
    answers = []

    def work():
        with stop_signal() as stopped, stop_requests() as requests:
            answers.append((stopped(), requests.first))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [(False, None)]


def test_a_start_that_waits_for_a_compiler_ends_at_the_first_signal(tmp_path):
    compiler = tmp_path / "hangs"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nsleep 1000\n")
    compiler.chmod(0o755)
    code = """
import pathlib
from icl.execution.signals import stop_signal
from icl.native.build import load_library
with stop_signal():
    load_library(pathlib.Path("none.cpp"), {})
"""
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "asked").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)  # the compiler needs longer
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("number", ALL)
def test_the_status_tells_a_scheduler_that_the_work_goes_on(number):
    with stop_signal() as stopped:
        assert not stopped()
        assert status_of_stop() == 1
        send(number)
        assert stopped()
    assert status_of_stop() == (1 if number == signal.SIGINT else AGAIN)
