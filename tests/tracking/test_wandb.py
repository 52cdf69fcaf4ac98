"""The W&B tracker in processes of its own, against a loopback server in all states of health."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from wandb_server import wandb_server

from icl.config import ConfigError
from icl.tracking import LocalTracker, NullTracker, read_metrics
from icl.tracking.agent import agent_run
from icl.tracking.opening import _unless_given, open_tracker, replay
from icl.tracking.wandb import Labels, wandb_is_set_up

STEPS = 40
PATIENCE_S = 300  # of the tests themselves, on a machine that does much else
ROWS = [{"step": step, "loss": 1 / (step + 1)} for step in range(STEPS)]
# Logs ROWS from the step given on, waiting for a line of input in the middle.
PROGRAM = """
import sys
from pathlib import Path
from matplotlib.figure import Figure
from icl.tracking.opening import open_tracker
first, last, status = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tracker = open_tracker("run", "readable-name", {"a": {"b": 1}}, next_step=first, project="icl")
print("ready", flush=True)
for step in range(first, last):
    if step == 20:
        sys.stdin.readline()
    tracker.log(step, {"loss": 1 / (step + 1)}, {"trace": Figure()} if step == last - 1 else None)
tracker.summary({"best": 0.5})
tracker.finish(status, "out of luck" if status == "failed" else "")
print("end", flush=True)
"""


def start(folder: Path, environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    # On a machine that does much else a healthy server must not be taken for a dead one.
    patience = {"WANDB_INIT_TIMEOUT": str(PATIENCE_S), "WANDB_FINISH_TIMEOUT": str(PATIENCE_S)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments or (0, STEPS, "finished"))],
        cwd=folder,
        # Without its cache matplotlib would look for fonts in every process anew.
        env={**kept, **patience, "HOME": str(folder), "MPLCONFIGDIR": matplotlib.get_configdir(), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> list[str]:
    """What the process said of W&B, once it has ended well."""
    output, errors = process.communicate("\n", timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert output.endswith("end\n")
    return [line for line in errors.splitlines() if "W&B" in line or "wandb" in line]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def history(run) -> list[dict]:
    return [{"step": row["_step"], "loss": row["loss"]} for row in run.history if "loss" in row]


def test_everything_arrives_at_a_healthy_server(tmp_path):
    with wandb_server() as server:
        said = end(start(tmp_path, server.environment()))
        ((name, run),) = server.runs.items()
    assert said == [f"W&B: {server.url}/local/icl/runs/{name}"]
    assert (run.display_name, run.project, run.state) == ("readable-name", "icl", "finished")
    assert history(run) == read_metrics(tmp_path / "run") == ROWS
    assert run.plain_config == {"a": {"b": 1}}
    assert run.summary["best"] == 0.5
    assert any(path.endswith(".png") for path in run.uploads)
    assert (tmp_path / "run" / "images" / f"trace-{STEPS - 1}.png").exists()


def test_whatever_the_server_does_the_run_ends_with_everything_kept_and_one_line_said(tmp_path):
    with wandb_server() as refusing, wandb_server() as ill, wandb_server() as slow, wandb_server() as dying:
        refusing.die()
        ill.fault, slow.fault = "error", "slow"
        limits = {"WANDB_INIT_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "2"}
        servers = {"refusing": refusing, "ill": ill, "slow": slow, "dying": dying}
        # Only a run that its server has taken sees it die.
        patient = {"dying": {"WANDB_INIT_TIMEOUT": str(PATIENCE_S)}}
        processes = {
            name: start(tmp_path / name, server.environment() | limits | patient.get(name, {}))
            for name, server in servers.items()
        }
        wait_until(lambda: any(run.config for run in dying.runs.values()))
        dying.die()
        said = {name: end(process) for name, process in processes.items()}
    assert said["dying"].pop(0).startswith(f"W&B: {dying.url}")
    for name in servers:
        assert read_metrics(tmp_path / name / "run") == ROWS, name
        (line,) = said[name]
        assert "send it later: wandb sync " in line, name
        assert list(Path(line.split()[-1]).glob("*.wandb")), name

    # What was kept can be sent once there is a server again.
    commands = [line[line.index("wandb sync ") :].split()[1:] for (line,) in said.values()]
    with wandb_server() as server:
        environment = {**os.environ, **server.environment()}
        for words in commands:
            command = [str(Path(sys.executable).parent / "wandb"), *words]
            subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert len(server.runs) == 4
    for run in server.runs.values():
        assert (run.display_name, run.state) == ("readable-name", "finished")
        assert history(run) == ROWS
        assert run.summary["best"] == 0.5


def test_a_run_that_began_offline_and_was_continued_twice_is_one_whole_run_there(tmp_path):
    end(start(tmp_path, {"WANDB_MODE": "offline"}, 0, 15, "interrupted"))
    with wandb_server() as server:
        end(start(tmp_path, server.environment(), 15, 30, "interrupted"))
        # The state that training goes on from may be older than what was sent.
        end(start(tmp_path, server.environment(), 25, STEPS, "finished"))
        (run,) = server.runs.values()
    assert (run.state, run.display_name) == ("finished", "readable-name")
    assert history(run) == read_metrics(tmp_path / "run") == ROWS


def test_a_failed_run_tells_why_until_it_goes_on(tmp_path):
    with wandb_server() as server:
        end(start(tmp_path, server.environment(), 0, 20, "failed"))
        (run,) = server.runs.values()
        assert (run.state, run.summary["error"]) == ("failed", "out of luck")
        end(start(tmp_path, server.environment(), 20, STEPS, "finished"))
        assert (run.state, run.summary.get("error")) == ("finished", None)
        assert history(run) == ROWS


def test_without_a_key_the_record_is_local_unless_w_and_b_is_asked_for(tmp_path):
    assert not wandb_is_set_up({"NETRC": str(tmp_path / "absent")})
    nothing = {"NETRC": str(tmp_path / "absent")}
    assert isinstance(open_tracker(tmp_path, "name", {}, environ=nothing), LocalTracker)
    assert isinstance(open_tracker(tmp_path, "name", {}, environ=nothing, wanted="none"), NullTracker)
    disabled = {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}
    assert isinstance(open_tracker(tmp_path, "name", {}, environ=disabled, wanted="wandb"), LocalTracker)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"WANDB_API_KEY": "x"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_SWEEP_ID": "x"}, True),
        ({"WANDB_BASE_URL": "http://known.example:8080"}, True),
        ({"WANDB_BASE_URL": "http://other.example"}, False),
    ],
)
def test_where_w_and_b_is_set_up(tmp_path, environ, expected):
    (tmp_path / "netrc").write_text("machine known.example login user password key\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_is_set_up({**environ, "NETRC": str(tmp_path / "netrc")}) is expected


def test_a_local_record_can_be_sent_afterwards(tmp_path):
    tracker = LocalTracker(tmp_path / "run")
    for row in ROWS:
        tracker.log(row["step"], {"loss": row["loss"]})
    (tmp_path / "picture.png").write_bytes(b"picture")
    tracker.log(STEPS, {}, {"trace": tmp_path / "picture.png"})
    tracker.summary({"best": 0.5})
    tracker.finish()
    copy = LocalTracker(tmp_path / "copy")
    replay(tmp_path / "run", copy)
    copy.finish()
    for name in ("metrics.jsonl", "summary.json", f"images/trace-{STEPS}.png"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_the_agents_configuration_is_read_from_its_file(tmp_path):
    assert agent_run({}) is None
    assert agent_run({"WANDB_RUN_ID": "x"}) is None
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"wandb_version": 1, "task_config": {"value": {"seed": None}}, "lr": {"value": "1e-4"}}))
    environ = {"WANDB_RUN_ID": "x", "WANDB_SWEEP_PARAM_PATH": str(path)}
    run = agent_run(environ)
    assert run is not None
    assert (run.run_id, run.config) == ("x", {"task_config": {"seed": None}, "lr": 1e-4})
    path.unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        agent_run(environ)


def test_the_clients_own_variables_take_precedence_over_labels():
    labels = Labels("trial", ("small", "two seeds"), "train")
    assert labels.arguments == {"group": "trial", "tags": ("small", "two seeds"), "job_type": "train"}
    variables = {"WANDB_RUN_GROUP": "another", "WANDB_TAGS": "large", "WANDB_JOB_TYPE": ""}
    assert _unless_given(labels, variables).arguments == {"job_type": "train"}
