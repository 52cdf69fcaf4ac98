"""The estimates along one run on several GPUs: one process per GPU, and one group of checkpoints at a time in each.

Each process sees its own GPU only, and computes as on a machine with a single one. It stores nothing: the process that started it records
the estimates, and ends it when all are there or the run is to stop. If that process dies, the connection breaks, and the work ends, too.
"""

import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait

import torch

from icl.devices import resolve_device, seen_alone
from icl.estimation import LLCConfig
from icl.estimation.along_run import Tell
from icl.estimation.estimate import estimates_of
from icl.sampling import LLCResult
from icl.subjects import Subject

TELL_S = 0.2
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class OnePerDevice:
    """Processes for estimates, one on each of some GPUs; see `icl.estimation.along_run.Workers`.

    Attributes:
        devices: the GPUs.
        make_subject: makes the subject of the estimates in each process. A function of a module, because its name is sent there.
    """

    devices: Sequence[torch.device]
    make_subject: Callable[[LLCConfig], Subject]

    def __len__(self) -> int:
        return len(self.devices)

    def estimates(self, config: LLCConfig, groups: Sequence[Sequence[int]], tell: Tell) -> Generator[list[LLCResult]]:
        """The estimates at each group of checkpoints, in the order of the groups.

        Raises:
            RuntimeError: something else ended a process. What goes wrong in an estimate is raised in its turn.
        """
        context = get_context("spawn")
        idle, busy = list[Connection](), dict[Connection, int]()
        waiting, ready = deque(enumerate(groups)), dict[int, list[LLCResult] | Exception]()
        done, total = [0] * len(groups), 0
        # The first process would start it, and Python 3.11 then lets SIGINT and SIGTERM through again.
        resource_tracker.ensure_running()
        with ExitStack() as opened:
            for device in self.devices[: len(groups)]:
                ours, theirs = context.Pipe()
                idle.append(opened.enter_context(ours))
                # No daemon, because those may have no children, as a subject's DataLoader may.
                process = context.Process(target=_serve, args=(theirs, config, self.make_subject))
                with theirs, _born_with(seen_alone([device])):
                    process.start()
                    opened.callback(process.join)
                    opened.callback(process.kill)  # before it is joined
            for number in range(len(groups)):
                while number not in ready:
                    while idle and waiting:
                        connection = idle.pop(0)
                        busy[connection], steps = waiting.popleft()
                        with suppress(ConnectionError):  # of a process that has ended; reading will say so
                            connection.send(steps)
                    for connection in wait(list(busy), TELL_S):
                        assert isinstance(connection, Connection)
                        message = _received(connection)
                        if isinstance(message, tuple):
                            done[busy[connection]], total = message
                        else:
                            ready[busy.pop(connection)] = message
                            if isinstance(message, list):
                                idle.append(connection)
                    tell(sum(done), total)
                result = ready.pop(number)
                if isinstance(result, Exception):
                    raise result
                yield result


def _received(connection: Connection) -> tuple[int, int] | list[LLCResult] | Exception:
    """What a process says: how far it is, its estimates, or what went wrong."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return RuntimeError(
            "a process with estimates was ended, perhaps for its memory; start the command again to go on"
        )


def _serve(connection: Connection, config: LLCConfig, make_subject: Callable[[LLCConfig], Subject]) -> None:
    """The life of a process: receives groups of checkpoints and sends their estimates, until an error or the end of the connection."""
    told = 0.0

    def send(message: object) -> None:
        connection.send_bytes(pickle.dumps(message))  # `send` would share the tensors' memory, one open file for each

    def report(now: int, total: int) -> None:
        nonlocal told
        if now == total or time.monotonic() - told > TELL_S:
            told = time.monotonic()
            send((len(steps) * now, total))

    with suppress(EOFError, ConnectionError):
        try:
            subject, device = make_subject(config), resolve_device(os.environ.get("DEVICE"))
            while True:
                steps: Sequence[int] = connection.recv()
                models = [subject.model(step) for step in steps]
                send(list(estimates_of(config, subject, steps, models, device, report)))
        except Exception as error:
            send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The error as it arrives elsewhere, or its name and text if it cannot be sent."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _born_with(environment: Mapping[str, str]) -> Iterator[None]:
    """Processes started within this block have these variables from the start, because the user's script, which they import first, may
    look for GPUs. They get no signals. Ctrl-C and schedulers send theirs to all; the recording process acts on them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    before = {name: os.environ[name] for name in environment if name in os.environ}
    try:
        os.environ.update(environment)
        yield
    finally:
        for name in environment.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
