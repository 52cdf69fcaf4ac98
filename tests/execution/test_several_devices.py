"""Several accelerators: runs, and the checkpoints of one run, are divided among them. The accelerators are a stand-in; the rest is real."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icl.commands.sweep import run_sweep_command
from icl.config import ConfigError, TrainingConfig
from icl.config.sweeps import expand, load_sweep
from icl.devices import seen_alone
from icl.estimation import LLCConfig
from icl.estimation.traces import read_estimates
from icl.execution import llc_run, several_devices
from icl.execution import sweep as execution
from icl.execution.llc_run import run_llc
from icl.execution.local import LocalProcess
from icl.execution.names import by_name
from icl.execution.schedule import Ended
from icl.execution.several_devices import OnePerDevice
from icl.execution.surroundings import Surroundings
from icl.execution.sweep import least_busy, run_sweep, shared
from icl.execution.training_runs import batches, run_training
from icl.storage import LocalStore
from icl.subjects.named import imported
from icl.tracking import read_metrics

GPUS = [torch.device("cuda", index) for index in range(2)]
SWEEP = """\
method: grid
command: ["${env}", "icl", "train"]
parameters:
  task_config: {parameters: {task_size: {value: 2}, max_examples: {value: 3}, num_tasks: {value: inf}, embed_size: {value: 4},
      mlp_size: {value: 5}, num_heads: {value: 2}, num_layers: {value: 1}, model_seed: {values: [0, 1, 2]}}}
  num_steps: {value: 30}
  batch_size: {value: 7}
  eval_batch_size: {value: 11}
"""
Started = list[tuple[str, tuple[str, ...]]]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Surroundings:
    (tmp_path / "mine.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    for key in [key for key in os.environ if key.startswith(("WANDB", "AWS", "ICL_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "checkpoints"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    return Surroundings.from_environment(tracking="local")


@pytest.fixture
def started(monkeypatch) -> Started:
    """Two GPUs, and what each process is told. It then computes on the CPU after all."""
    told: Started = []

    class Process(LocalProcess):
        def __init__(self, command, log, environment):
            assert environment["DEVICE"] == "cuda"
            told.append((environment["CUDA_VISIBLE_DEVICES"], tuple(command)))
            super().__init__(command, log, environment | {"DEVICE": "cpu"})

    monkeypatch.setattr(execution, "devices_for_runs", lambda device: GPUS)
    monkeypatch.setattr(execution, "runs_at_once", lambda device: len(GPUS))
    monkeypatch.setattr(execution, "LocalProcess", Process)
    return told


def points(path: str = "mine.yaml") -> list[TrainingConfig]:
    return [TrainingConfig.parse(data) for data in expand(load_sweep(path))]


def test_a_process_gets_the_devices_that_the_fewest_have():
    first, second = shared(GPUS, 5)
    assert (first, second) == ((GPUS[0],), (GPUS[1],))
    assert least_busy([first, second], []) == first
    assert least_busy([first, second], [first]) == second
    assert least_busy([first, second], [second, first, second]) == first


def test_devices_without_a_process_of_their_own_are_given_to_others():
    five = [torch.device("cuda", index) for index in range(5)]
    assert [[device.index for device in share] for share in shared(five, 2)] == [[0, 2, 4], [1, 3]]
    assert shared(five, 1) == [tuple(five)]


def test_each_run_has_a_device_of_its_own(place, started):
    assert run_sweep("train", points(), place, None, "local") == 0
    assert [device for device, _ in started[:2]] == ["0", "1"]
    assert len(started) == 3
    assert {len(read_metrics(place.results / name)) > 0 for name in by_name(points())} == {True}


@pytest.mark.parametrize(("seeds", "rates", "parts", "sizes"), [
    (5, 1, 1, [5]), (5, 1, 2, [3, 2]), (5, 1, 8, [1] * 5), (3, 2, 2, [3, 3]), (3, 2, 4, [2, 1, 2, 1]),
])  # fmt: skip
def test_groups_of_seeds_are_divided_only_if_devices_would_be_idle(seeds, rates, parts, sizes):
    configs = [
        TrainingConfig.parse({"task_config": {"model_seed": seed}, "optimizer_config": {"lr": 0.1 / (rate + 1)}})
        for rate in range(rates)
        for seed in range(seeds)
    ]
    groups = batches(configs, parts)
    assert [len(group) for group in groups] == sizes
    assert sorted(config.name for group in groups for config in group) == sorted(config.name for config in configs)
    assert all(len({config.optimizer_config.lr for config in group}) == 1 for group in groups)


def test_a_group_of_seeds_trains_as_one_batch_on_each_device(place, started, monkeypatch):
    monkeypatch.setattr("icl.commands.sweep.devices_for_runs", lambda device: GPUS)
    assert run_sweep_command("train", Path("mine.yaml"), None, [], None, "batch", "local") == 0
    assert [device for device, _ in started] == ["0", "1"]
    groups = [points(next(word for word in command if word.endswith(".yaml"))) for _, command in started]
    assert [[config.task_config.model_seed for config in group] for group in groups] == [[0, 2], [1]]
    assert all("batch" in command for _, command in started)
    for config in points():
        assert place.checkpoints(config).finished_step() == 29
    started.clear()
    assert run_sweep_command("train", Path("mine.yaml"), None, [], None, "batch", "local") == 0
    assert started == []


SAMPLER = {"num_chains": 2, "num_draws": 5, "epsilon": 1e-5, "gamma": 1.0, "nbeta": 10.0, "init_seed": 0}


class Soon:
    """A process that ends a little later."""

    def __init__(self, *_):
        self.polls = 0

    def poll(self):
        self.polls += 1
        return Ended(True) if self.polls > 3 else None

    def note(self):
        return ""


@pytest.mark.parametrize(("command", "gpus", "complete", "given"), [
    ("train", 2, 0, ["0", "1", "0"]), ("llc", 2, 0, ["0", "1", "0"]), ("train", 5, 0, ["0", "1", "2"]),
    ("llc", 5, 0, ["0,3", "1,4", "2"]), ("train", 5, 2, ["0"]), ("llc", 5, 2, ["0,1,2,3,4"]), ("llc", 5, 3, []),
])  # fmt: skip
def test_runs_take_turns_and_estimates_use_the_devices_that_would_be_idle(
    command, gpus, complete, given, place, monkeypatch
):
    told = []

    def start(words, log, environment):
        told.append(environment["CUDA_VISIBLE_DEVICES"])
        return Soon()

    monkeypatch.setattr(
        execution, "devices_for_runs", lambda device: [torch.device("cuda", index) for index in range(gpus)]
    )
    monkeypatch.setattr(execution, "runs_at_once", lambda device: gpus)
    monkeypatch.setattr(execution, "LocalProcess", start)
    configs = points()
    if command == "llc":
        configs = [LLCConfig.parse({**each.model_dump(mode="json"), "sampler_config": SAMPLER}) for each in configs]
    monkeypatch.setattr(execution, "is_complete", lambda config, place: config in configs[:complete])
    assert run_sweep(command, configs, place, None, "local") == 0
    assert told == given


SUBJECT = """\
import os, pathlib, signal, time
import torch

class TwoParts(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")  # so it is sent with one part, and cannot be made of that

def lost_key(config):
    raise KeyError("weights")

def lost_parts(config):
    raise TwoParts("one", "other")

class Lines:
    def __init__(self, lost=-1, ended=-1, meet=2, loaders=0):
        self.lost, self.ended, self.meet, self.loaders = lost, ended, meet, loaders

    def steps(self):
        return [0, 1, 2, 3, 4]

    def model(self, step):
        if (gpu := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # in a process of one GPU
            pathlib.Path(f"{step}.of-{gpu}-{os.getpid()}").touch()
            while len({path.suffix.split("-")[1] for path in pathlib.Path().glob("*.of-*")}) < self.meet:
                time.sleep(0.02)  # until another GPU has a checkpoint, too
            if step == self.ended:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == self.lost:
                raise OSError(f"the weights of step {step} cannot be read")
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.constant_(model.weight, step)
        return model

    def loss(self, predict, batch):
        return (predict(batch[0]) - batch[1]).square().mean()

    def batches(self, step):
        xs = torch.randn(23, 3, generator=torch.Generator().manual_seed(1))
        batch = xs, xs.sum(dim=1, keepdim=True)
        if not self.loaders:
            return [batch]
        data = torch.utils.data.TensorDataset(*batch)
        return torch.utils.data.DataLoader(data, batch_size=7, shuffle=True, num_workers=self.loaders)
"""


@pytest.fixture
def two_gpus(place, monkeypatch) -> Surroundings:
    """A place where estimates along a run find two GPUs; the processes compute on the CPU after all."""
    (Path.cwd() / "mine.py").write_text(SUBJECT)
    monkeypatch.setattr(llc_run, "devices_for_runs", lambda device: GPUS)
    monkeypatch.setattr(several_devices, "seen_alone", lambda devices: seen_alone(devices) | {"DEVICE": "cpu"})
    return place


def lines(**settings) -> LLCConfig:
    return LLCConfig.parse({"subject": "mine:Lines", "subject_config": settings, "sampler_config": SAMPLER})


def rows_of(config: LLCConfig, place: Surroundings) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key != "time"}
        for row in read_estimates(place.results / config.name)
    ]


def test_checkpoints_of_one_run_are_divided_and_have_the_estimates_of_one_device(two_gpus, monkeypatch):
    assert run_llc(lines(), two_gpus) == 0
    assert {path.suffix.split("-")[1] for path in Path.cwd().glob("*.of-*")} == {"0", "1"}
    assert sorted(int(path.stem) for path in Path.cwd().glob("*.of-*")) == [0, 1, 2, 3, 4]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    divided = rows_of(lines(), two_gpus)
    assert [row["step"] for row in divided] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(llc_run, "devices_for_runs", lambda device: GPUS[:1])
    assert run_llc(lines(meet=0), two_gpus) == 0
    assert rows_of(lines(meet=0), two_gpus) == divided


@pytest.mark.parametrize(("trouble", "said"), [
    ({"lost": 3}, "the weights of step 3 cannot be read"), ({"ended": 3}, "ended, perhaps for its memory; start the command again"),
])  # fmt: skip
def test_what_goes_wrong_at_one_checkpoint_does_not_cost_those_before_it(trouble, said, two_gpus):
    with pytest.raises((ConfigError, RuntimeError), match=said):
        run_llc(lines(**trouble), two_gpus)
    assert [row["step"] for row in rows_of(lines(**trouble), two_gpus)] == [0, 1, 2]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("make", "kind", "said"), [
    ("lost_key", KeyError, "weights"), ("lost_parts", RuntimeError, "TwoParts: one and other"),
])  # fmt: skip
def test_an_error_of_any_kind_is_told_as_it_is(make, kind, said, two_gpus):
    workers = OnePerDevice(GPUS, imported(f"mine:{make}"))
    with pytest.raises(kind, match=said):
        next(workers.estimates(lines(), [[0], [1]], lambda now, total: None))


def test_a_process_that_ends_before_its_first_checkpoint_says_so(two_gpus, monkeypatch):
    (Path.cwd() / "ends.py").write_text("import os\ndef make(config): os._exit(1)")
    start = several_devices._born_with

    @contextmanager
    def and_ended(environment):
        with start(environment):
            yield
            for process in multiprocessing.active_children():
                process.join()

    monkeypatch.setattr(several_devices, "_born_with", and_ended)
    workers = OnePerDevice(GPUS, imported("ends:make"))
    with pytest.raises(RuntimeError, match="ended, perhaps for its memory; start the command again"):
        next(workers.estimates(lines(), [[0], [1]], lambda now, total: None))


def test_a_process_that_cannot_be_started_says_why(two_gpus):
    def inner(config):
        raise AssertionError

    workers = OnePerDevice(GPUS, inner)  # not a function of a module
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"pickle.*inner"):
        next(workers.estimates(lines(), [[0], [1]], lambda now, total: None))


def test_a_subject_may_load_its_data_in_processes_of_its_own(two_gpus):
    # The loader's processes begin after some steps.
    sampler = {**SAMPLER, "num_draws": 10}
    config = LLCConfig.parse(
        {"subject": "mine:Lines", "subject_config": {"loaders": 2}, "sampler_config": sampler, "steps": [0, 1]}
    )
    assert run_llc(config, two_gpus) == 0
    assert [row["step"] for row in rows_of(config, two_gpus)] == [0, 1]


def test_a_run_in_another_store_than_the_environments_is_found(two_gpus, tmp_path):
    training = points()[0]
    elsewhere = replace(two_gpus, store=LocalStore(tmp_path / "elsewhere"))
    assert run_training(training, elsewhere).finished
    config = LLCConfig.parse({**training.model_dump(mode="json"), "sampler_config": SAMPLER, "steps": [0, 29]})
    assert run_llc(config, elsewhere) == 0


ENDLESS = """\
import os, pathlib
import torch
from icl.devices import seen_alone
from icl.estimation import LLCConfig
from icl.execution import llc_run, several_devices
from icl.execution.surroundings import Surroundings

llc_run.devices_for_runs = lambda device: [torch.device("cuda", index) for index in range(2)]
several_devices.seen_alone = lambda devices: seen_alone(devices) | {"DEVICE": "cpu"}
pathlib.Path(f"script-on-{os.environ.get('CUDA_VISIBLE_DEVICES')}").touch()  # the other processes import it, too
if __name__ == "__main__":
    config = LLCConfig.parse({"subject": "mine:Lines", "sampler_config": {**SAMPLER, "num_draws": 10**7}})
    print("left:", llc_run.run_llc(config, Surroundings.from_environment(tracking="local")))
"""


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "left: 5\n"), (signal.SIGKILL, "")])
def test_the_processes_end_with_the_one_that_started_them(number, said, place):
    (Path.cwd() / "mine.py").write_text(SUBJECT)
    (Path.cwd() / "endless.py").write_text(ENDLESS.replace("SAMPLER", repr(SAMPLER)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path])}
    run = subprocess.Popen(
        [sys.executable, "endless.py"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while len(list(Path.cwd().glob("*.of-*"))) < 2:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if number == signal.SIGKILL:
            run.kill()
        else:
            os.killpg(run.pid, number)  # as a terminal and a scheduler do
        output, errors = run.communicate(timeout=120)  # returns when no process has the output open
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert output == said
    assert "Traceback" not in errors
    assert {path.name for path in Path.cwd().glob("script-on-*")} == {f"script-on-{gpu}" for gpu in (None, 0, 1)}
