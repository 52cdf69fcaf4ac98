"""The real `wandb sweep` and `wandb agent` against a loopback server, and the same sweep offline."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from wandb_server import RunRecord, WandbServer, wandb_server

from icl.native.build import cache_folder
from icl.tracking import read_metrics

pytestmark = pytest.mark.xdist_group("wandb-agents")  # the sweep that most of these look at runs once

TASK = {
    **{"task_size": 2, "max_examples": 3, "noise_variance": 0.25, "embed_size": 4, "mlp_size": 5, "num_heads": 2},
    **{"num_layers": 1, "pretrain_seed": None, "true_seed": None, "sampling_seed": None},
}
GRID = {"parameters": {"log_space": {"value": 3}, "linear_space": {"value": 3}}}
SHOWN = {"group": "trial", "tags": ["tiny", "two seeds"], "seed_table": True}
STEPS = 60
PATIENCE_S = 600  # of the tests themselves, on a machine that does much else


def constants(**values):
    return {key: {"value": value} for key, value in values.items()}


def training_sweep(steps: int = STEPS) -> dict:
    """A 2 x 2 grid of runs of a second each."""
    task = {**constants(**TASK), "num_tasks": {"values": ["inf", 5]}, "model_seed": {"values": [0, 1]}}
    return {
        "name": "tiny",
        "method": "grid",
        "command": ["${env}", "icl", "train"],
        "project": "tiny-project",
        "parameters": {
            "task_config": {"parameters": task},
            "checkpointer_config": {"parameters": {"checkpoint_steps": GRID, **constants(state_every=20)}},
            "logger_config": {"parameters": {"logging_steps": GRID, **constants(loss_every=10, **SHOWN)}},
            **constants(num_steps=steps, batch_size=7, eval_batch_size=11),
        },
    }


def llc_sweep() -> dict:
    """Estimates at two checkpoints of one of those runs, after an impossible one."""
    sweep = training_sweep()
    parameters = sweep["parameters"]
    parameters["task_config"]["parameters"].update(constants(num_tasks="inf", model_seed=0))
    sampler = constants(num_chains=2, num_draws=3, grad_batch_size=5, epsilon=1e-4, gamma=1.0, nbeta=10.0, init_seed=0)
    parameters.update({"sampler_config": {"parameters": sampler}, "step": {"values": [-1, 0, STEPS - 1]}})
    return {**sweep, "name": "tiny-llc", "command": ["${env}", "icl", "llc"]}


class Workplace:
    """A folder with its own checkpoints, in which programs run as a user would start them."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        folder.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "AWS_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
        # A home without a key for W&B, but with the kernels that are compiled already.
        home = {"HOME": str(folder), "WANDB_CACHE_DIR": str(folder), "XDG_CACHE_HOME": str(cache_folder().parent)}
        own = {"PATH": path, "LOCAL_ROOT": "checkpoints", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        # On a machine that does much else a healthy server must not be taken for a dead one.
        patience = {"WANDB_INIT_TIMEOUT": str(PATIENCE_S), "WANDB_FINISH_TIMEOUT": str(PATIENCE_S)}
        self.environment = {**kept, **home, **own, **patience, **environment}

    def write(self, sweep: dict) -> str:
        path = self.folder / f"{sweep['name']}.yaml"
        path.write_text(yaml.safe_dump(sweep))
        return path.name

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *command: str) -> str:
        process = self.start(*command)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output
        return output

    def create_sweep(self, sweep: dict) -> str:
        output = self.run("wandb", "sweep", self.write(sweep))
        (agent,) = re.findall(r"wandb agent (\S+)", output)
        return agent

    def results(self) -> dict[str, Path]:
        """Folders of the runs by name."""
        return {path.parent.name: path.parent for path in sorted(self.folder.glob("checkpoints/icl/*/metrics.jsonl"))}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


@dataclass
class Hosted:
    """A training sweep and then an LLC sweep over its checkpoints, each done by two agents at once."""

    server: WandbServer
    place: Workplace
    training: list[RunRecord]
    estimates: list[RunRecord]
    said: str


@pytest.fixture(scope="module")
def hosted(tmp_path_factory) -> Iterator[Hosted]:
    with wandb_server() as server:
        place = Workplace(tmp_path_factory.mktemp("agents") / "hosted", server.environment())
        agent = place.create_sweep(training_sweep())
        finish(*(place.start("wandb", "agent", agent) for _ in range(2)))
        training = list(server.runs.values())
        agent = place.create_sweep(llc_sweep())
        said = "".join(finish(*(place.start("wandb", "agent", agent) for _ in range(2))))
        yield Hosted(server, place, training, list(server.runs.values())[len(training) :], said)


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


def test_two_agents_train_each_point_once_and_every_metric_arrives(hosted):
    assert hosted.server.unknown == []
    points = {
        (run.plain_config["task_config"]["num_tasks"], run.plain_config["task_config"]["model_seed"])
        for run in hosted.training
    }
    assert points == {("inf", 0), ("inf", 1), (5, 0), (5, 1)}
    assert len(hosted.training) == 4
    folders = hosted.place.results()
    for run in hosted.training:
        assert (run.state, run.project) == ("finished", "tiny-project")
        local = read_metrics(folders[str(run.display_name)])
        assert [row["step"] for row in local][-1] == STEPS - 1
        assert [row["_step"] for row in run.history] == [row["step"] for row in local]
        shown = [without(without(row, "_step"), "over_seeds") for row in run.history]
        assert shown == [without(row, "step") for row in local]


def test_group_tags_and_job_type_arrive(hosted):
    for runs, job_type in ((hosted.training, "train"), (hosted.estimates, "llc")):
        for run in runs:
            if run.state == "finished":
                assert (run.group, run.tags, run.job_type) == (SHOWN["group"], SHOWN["tags"], job_type)
                assert run.alerts == []


def seed_table(run: RunRecord) -> dict[str, list]:
    """The rows of the newest table over seeds, by metric."""
    (path,) = [name for name in run.uploads if name.startswith("media/html/over_seeds")]
    lines = re.findall("<tr>(.*?)</tr>", run.uploads[path].decode())
    head, *rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in lines]
    assert head == ["metric", "mean", "sd", "n"]
    return {metric: rest for metric, *rest in rows}


def test_the_seed_that_ends_last_shows_mean_deviation_and_number_over_all_seeds(hosted):
    for tasks in ("inf", 5):
        runs = [run for run in hosted.training if run.plain_config["task_config"]["num_tasks"] == tasks]
        values = [run.summary["pretrain/mse"] for run in runs]
        last = max((seed_table(run)["pretrain/mse"] for run in runs), key=lambda row: row[2])
        assert last == [f"{statistics.mean(values):.6g}", f"{statistics.stdev(values):.6g}", "2"]


@pytest.mark.parametrize("alert", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_that_diverges_is_told_at_once_unless_that_is_switched_off(alert, tmp_path):
    sweep = training_sweep()
    sweep["parameters"]["task_config"]["parameters"].update(constants(num_tasks="inf", model_seed=0))
    optimizer = {"optimizer_type": {"value": "SGD"}, "lr": {"values": [0.01, 1e30]}}
    sweep["parameters"]["optimizer_config"] = {"parameters": optimizer}
    sweep["parameters"]["logger_config"]["parameters"].update(constants(alert=alert))
    with wandb_server() as server:
        place = Workplace(tmp_path / "hosted", server.environment())
        agent = place.create_sweep(sweep)
        for process in [place.start("wandb", "agent", agent) for _ in range(2)]:
            process.communicate(timeout=PATIENCE_S)
        by_state = {run.state: run for run in server.runs.values()}
    assert server.unknown == []
    assert by_state["finished"].alerts == []
    told = [(each["title"], each["text"], each["severity"]) for each in by_state["failed"].alerts]
    reason = by_state["failed"].summary["error"]
    assert "the loss became" in reason
    assert told == ([("The run diverged", reason, "ERROR")] if alert else [])


def test_the_summary_holds_the_headline_numbers_and_the_checkpoints_are_stored(hosted):
    folders = hosted.place.results()
    for run in hosted.training:
        folder = folders[str(run.display_name)]
        summary = json.loads((folder / "summary.json").read_text())
        assert summary.pop("status") == "finished"
        assert "pretrain/mse" in summary
        assert summary.items() <= run.summary.items()
        assert {path.stem for path in folder.glob("[0-9]*.safetensors")} == {"0", "1", "7", "30", "59"}


def test_what_an_agents_run_prints_is_kept_beside_it(hosted):
    for name, folder in hosted.place.results().items():
        said = (folder / "output.log").read_text()
        assert name in said
        assert "W&B: http" in said


def test_the_llc_sweep_finds_those_checkpoints(hosted):
    estimates = [run for run in hosted.estimates if run.state == "finished"]
    assert sorted(run.history[0]["_step"] for run in estimates) == [0, STEPS - 1]
    for run in estimates:
        assert run.summary["llc/mean"] == run.history[-1]["llc/mean"]
        assert str(run.display_name).startswith("llc-L1H2Minf-K3-seed0-")


def test_an_invalid_configuration_fails_its_run_readably_and_the_agent_goes_on(hosted):
    (failed,) = [run for run in hosted.estimates if run.state != "finished"]
    assert failed.state == "failed"
    assert "step: Input should be greater" in failed.summary["error"]
    assert f"icl: {failed.summary['error']}" in hosted.said


def test_one_point_offline_gives_the_same_bytes(hosted, tmp_path):
    offline = Workplace(tmp_path / "offline", {})
    offline.run("icl", "train", offline.write(training_sweep()), "--index", "3")
    assert_equal_results(offline, hosted.place, 1)


def assert_equal_results(here: Workplace, there: Workplace, count: int) -> None:
    """All runs of one place are, byte for byte, those of the same name at the other."""
    theirs = there.results()
    assert len(here.results()) == count
    for name, folder in here.results().items():
        weights = [path.name for path in folder.glob("[0-9]*.safetensors")]
        for file in ("metrics.jsonl", "summary.json", *weights):
            assert (folder / file).read_bytes() == (theirs[name] / file).read_bytes(), (name, file)


@pytest.mark.slow
def test_the_whole_sweep_offline_gives_the_same_bytes_and_is_not_done_twice(hosted, tmp_path):
    offline = Workplace(tmp_path / "offline", {})
    said = offline.run("icl", "train", offline.write(training_sweep()), "--jobs", "2")
    assert "4 done" in said
    sweep = llc_sweep()
    sweep["parameters"]["step"]["values"].remove(-1)
    assert "2 done" in offline.run("icl", "llc", offline.write(sweep))
    assert_equal_results(offline, hosted.place, 6)
    before = {path: path.stat().st_mtime_ns for path in offline.folder.rglob("*.jsonl")}
    assert "4 done before" in offline.run("icl", "train", "tiny.yaml")
    assert before == {path: path.stat().st_mtime_ns for path in offline.folder.rglob("*.jsonl")}


def long_sweep(steps: int) -> dict:
    """Two runs that last."""
    sweep = training_sweep(steps)
    sweep["parameters"]["task_config"]["parameters"]["num_tasks"] = {"value": "inf"}
    sweep["parameters"]["checkpointer_config"]["parameters"]["state_every"] = {"value": 10**6}
    return sweep


def newest_states(place: Workplace) -> dict[str, int]:
    """The step of each run's saved state."""
    states = {}
    for path in place.folder.glob("checkpoints/icl/*/state-*.safetensors"):
        states[path.parent.name] = max(states.get(path.parent.name, 0), int(path.stem.partition("-")[2]))
    return states


def rows_of_each(place: Workplace) -> dict[str, list[dict]]:
    return {name: read_metrics(folder) for name, folder in place.results().items()}


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C, and what was said until the end. Whoever does not end by itself runs for longer than a test waits."""
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    return output


@pytest.mark.slow
def test_ctrl_c_stops_an_offline_sweep_with_the_last_step_saved(tmp_path):
    place = Workplace(tmp_path / "offline", {})
    sweep = place.start("icl", "train", place.write(long_sweep(10**6)), "--jobs", "2")
    wait_for(lambda: len([rows for rows in rows_of_each(place).values() if len(rows) > 20]) == 2)
    said = interrupt(sweep)
    assert sweep.returncode == 1
    assert "2 stopped" in said
    states = newest_states(place)
    for name, rows in rows_of_each(place).items():
        assert rows[-1]["step"] < states[name] <= rows[-1]["step"] + 10


@pytest.mark.slow
def test_ctrl_c_leaves_an_estimate_within_a_step_and_keeps_those_before_it(tmp_path):
    place = Workplace(tmp_path / "offline", {})
    place.run("icl", "train", place.write(training_sweep()), "--index", "0")
    sweep = llc_sweep()
    del sweep["parameters"]["step"]
    sweep["parameters"]["sampler_config"]["parameters"].update(constants(num_burnin_steps=20_000))
    estimates = place.start("icl", "llc", place.write(sweep))
    wait_for(lambda: any(name.startswith("llc-") and rows for name, rows in rows_of_each(place).items()))
    said = interrupt(estimates)
    assert estimates.returncode == 1, said
    (rows,) = [rows for name, rows in rows_of_each(place).items() if name.startswith("llc-")]
    assert 1 <= len(rows) < 5


def run_holders(place: Workplace) -> list[int]:
    """The processes that hold the runs of a place."""
    return [json.loads(path.read_text())["pid"] for path in place.folder.glob("checkpoints/icl/*/.lock-holder.json")]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["interrupt", "kill the agent", "kill the run", "kill both"])
def test_an_agents_run_that_was_cut_off_goes_on_when_it_is_handed_out_again(end, tmp_path):
    sweep = long_sweep(5000)
    sweep["parameters"]["task_config"]["parameters"]["model_seed"] = {"value": 0}
    sweep["parameters"]["checkpointer_config"]["parameters"]["state_every"] = {"value": 200}
    with wandb_server() as server:
        place = Workplace(tmp_path / "hosted", server.environment())
        address = place.create_sweep(sweep)
        agent = place.start("wandb", "agent", "--forward-signals", address)
        wait_for(lambda: newest_states(place))
        (run,) = server.runs.values()
        if end == "interrupt":
            interrupt(agent)
        elif end == "kill the agent":  # its orphan saves and stops while the next agent takes over
            agent.kill()
        else:
            (holder,) = run_holders(place)
            if end == "kill both":
                agent.kill()
            os.kill(holder, signal.SIGKILL)
        if end != "kill the run":
            agent.communicate(timeout=PATIENCE_S)
            server.requeue(run.name)
            place.run("wandb", "agent", address)
        else:  # the agent itself goes on
            server.requeue(run.name)
            finish(agent)
        assert list(server.runs.values()) == [run]
        ((name, local),) = rows_of_each(place).items()
        assert (run.state, run.display_name) == ("finished", name)
        assert [row["_step"] for row in run.history] == [row["step"] for row in local]
    offline = Workplace(tmp_path / "offline", {})
    offline.run("icl", "train", offline.write(sweep))
    assert_equal_results(offline, place, 1)


@pytest.mark.slow
def test_an_agent_goes_on_after_any_number_of_invalid_configurations(tmp_path):
    sweep = training_sweep(steps=3)
    sweep["parameters"]["task_config"]["parameters"].update(constants(num_tasks="inf", model_seed=0))
    sweep["parameters"]["task_config"]["parameters"]["num_heads"] = {"values": [3, 5, 6, 7, 2]}
    with wandb_server() as server:
        place = Workplace(tmp_path / "hosted", server.environment())
        said = place.run("wandb", "agent", place.create_sweep(sweep))
        *rejected, done = server.runs.values()
        assert [run.state for run in rejected] == ["failed"] * 4
        assert done.state == "finished"
        for run in rejected:
            assert f"icl: {run.summary['error']}" in said


@pytest.mark.slow
def test_the_device_of_the_environment_counts_and_a_wrong_one_is_a_readable_failure(tmp_path):
    sweep = training_sweep(steps=3)
    sweep["parameters"]["task_config"]["parameters"].update(constants(num_tasks="inf"))
    with wandb_server() as server:
        place = Workplace(tmp_path / "hosted", server.environment())
        address = place.create_sweep(sweep)
        place.environment["DEVICE"] = "abacus"
        finish(place.start("wandb", "agent", "--count", "1", address))
        place.environment["DEVICE"] = "cpu"
        finish(place.start("wandb", "agent", address))
        failed, done = server.runs.values()
        assert (failed.state, done.state) == ("failed", "finished")
        assert "abacus" in failed.summary["error"]


@pytest.mark.slow
def test_what_was_recorded_with_no_account_can_be_sent_afterwards(tmp_path):
    place = Workplace(tmp_path / "here", {})
    sweep = place.write(training_sweep())
    place.run("icl", "train", sweep)
    said = place.run("icl", "train", sweep, "--tracking", "wandb")
    assert "4 done" in said
    assert "4 done before" in place.run("icl", "train", sweep, "--tracking", "wandb")
    with wandb_server() as server:
        place.environment.update(server.environment())
        place.run("wandb", "sync", *map(str, place.folder.glob("wandb/offline-run-*")))
        local = rows_of_each(place)
        assert {run.display_name for run in server.runs.values()} == set(local)
        for run in server.runs.values():
            assert [row["_step"] for row in run.history] == [row["step"] for row in local[str(run.display_name)]]


@pytest.mark.slow
def test_the_runs_of_an_offline_sweep_that_is_killed_stop_and_go_on_when_it_is_started_again(tmp_path):
    place = Workplace(tmp_path / "offline", {})
    sweep = long_sweep(5000)
    first = place.start("icl", "train", place.write(sweep), "--jobs", "2")
    wait_for(lambda: len([rows for rows in rows_of_each(place).values() if len(rows) > 20]) == 2)
    first.kill()
    first.communicate(timeout=PATIENCE_S)
    assert "2 done" in place.run("icl", "train", "tiny.yaml", "--jobs", "2")
    quiet = Workplace(tmp_path / "quiet", {})
    quiet.run("icl", "train", quiet.write(sweep), "--jobs", "2")
    assert_equal_results(place, quiet, 2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuses", "dies", "error", "slow"])
def test_training_ends_whatever_the_server_does(fault, tmp_path):
    steps = 4000
    with wandb_server() as server:
        if fault == "refuses":
            server.die()
        else:
            server.fault = None if fault == "dies" else fault
        starting = PATIENCE_S if fault == "dies" else 15  # only a run that its server has taken sees it die
        limits = {"WANDB_INIT_TIMEOUT": str(starting), "WANDB_FINISH_TIMEOUT": "15"}
        place = Workplace(tmp_path / "here", {**server.environment(), **limits})
        process = place.start("icl", "train", place.write(long_sweep(steps)), "--index", "0")
        if fault == "dies":
            wait_for(lambda: any(run.config for run in server.runs.values()))
            server.die()
        (said,) = finish(process)
    (rows,) = rows_of_each(place).values()
    assert rows[-1]["step"] == steps - 1
    (line,) = [line for line in said.splitlines() if "W&B" in line and not line.startswith("W&B: http")]
    command = line[line.index("wandb sync ") :].split()
    with wandb_server() as server:
        place.environment.update(server.environment())
        place.run(*command)
        (run,) = server.runs.values()
        assert [row["_step"] for row in run.history] == [row["step"] for row in rows]
    quiet = Workplace(tmp_path / "quiet", {})
    quiet.run("icl", "train", quiet.write(long_sweep(steps)), "--index", "0")
    assert_equal_results(place, quiet, 1)


def test_a_users_own_subject_leaves_the_same_bytes_through_an_agent_and_offline(tmp_path):
    sampler = constants(num_chains=2, num_draws=11, epsilon=1e-3, nbeta=13.0, init_seed=5)
    sweep = {
        "name": "own",
        "method": "grid",
        "command": ["${env}", "icl", "llc"],
        "project": "tiny-project",
        "parameters": {
            **constants(subject="my_module:MySubject"),
            "subject_config": {"parameters": {"width": {"values": [2, 3]}}},
            "sampler_config": {"parameters": sampler},
        },
    }
    module = Path(__file__).parents[1] / "subjects" / "my_module.py"
    with wandb_server() as server:
        hosted, offline = Workplace(tmp_path / "hosted", server.environment()), Workplace(tmp_path / "offline", {})
        for place in (hosted, offline):
            (place.folder / "my_module.py").write_text(module.read_text())
        finish(hosted.start("wandb", "agent", hosted.create_sweep(sweep)))
    offline.run("icl", "llc", offline.write(sweep), "--tracking", "local")
    found = [place.results() for place in (hosted, offline)]
    assert list(found[0]) == list(found[1])
    assert len(found[0]) == 2
    for name in found[0]:
        one, other = ((runs[name] / "metrics.jsonl").read_bytes() for runs in found)
        assert one == other
