"""`icl report`: the numbers of the page are those of the tables, nothing that a user wrote is markup, and a browser draws it."""

import json
import math
import shutil
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import icl
from icl.checkpoints import Checkpoints
from icl.commands.report import continuing, report_command
from icl.config import ConfigError, TrainingConfig
from icl.config.sweeps import expand, load_sweep
from icl.execution.opened import Run
from icl.execution.points import llc_points
from icl.report import Material, gather, page, write_report
from icl.storage import LocalStore
from icl.tracking.trackers import LocalTracker
from icl.training.loop import train

SWEEP = """\
method: grid
parameters:
  task_config:
    parameters:
      task_size: {value: 3}
      max_examples: {value: 5}
      num_tasks: {value: inf}
      embed_size: {value: 14}
      mlp_size: {value: 11}
      num_layers: {value: 1}
      model_seed: {values: [1, 2]}
  optimizer_config:
    parameters:
      lr: {values: [0.01, 0.002]}
  num_steps: {value: 7}
  batch_size: {value: 13}
  eval_batch_size: {value: 17}
  checkpointer_config: {parameters: {checkpoint_steps: {value: [0, 3]}}}
"""
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">&amp;<b>%{x}"
STEPS = [0, 3, 10, 31, 100, 170, 310, 560, 1000, 1700, 3100, 5600, 10_000]
COURSE = [0.0, 0.1, 0.0, 10.0, 20.0, 30.0, 40.1, 40.0, 39.9, 40.0, 30.0, 18.0, 5.0]
"""A rest, a rise, a rest and a fall."""


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts by id."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.setdefault(self.elements[-1][1].get("id"), data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def report(self) -> dict:
        return json.loads(self.scripts["report"])

    def traces(self, chart: str) -> list[dict]:
        return next(
            [{**each["shared"], **trace} for trace in each["traces"]]
            for each in self.report()["charts"]
            if each["name"] == chart
        )


def leave_estimates(folder: Path, course: list[float]) -> None:
    """What `icl llc` leaves, with λ̂ of this course."""
    tracker = LocalTracker(folder)
    for step, value in zip(STEPS, course, strict=True):
        verdict = "healthy" if step else "chains disagree: split R-hat 1.3 is above 1.1 (more draws)"
        row = {"llc/mean": value, "llc/mcse": 0.3, "loss/init": 2 - 0.1 * math.log1p(step), "verdict": verdict}
        tracker.log(step, row | {f"llc/mean/{token}": value / (token + 2) for token in range(3)})
    tracker.finish()
    config = {"sampler_config": {"num_chains": 2, "epsilon": 1e-4, "gamma": 1.0, "nbeta": 10.0}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": step, "draw": [5, 10, 15], "loss": [[2, 1.5, 1.25], [2, 3, 1.5]], "distance": [[0.5, 1, 2], [1, 1, 1]]}
        for step in STEPS
    ]
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def leave_tables(folder: Path, run: str) -> None:
    """What `icl tabulate` leaves of a run."""
    keys = {"model_seed": 1, "optimizer_config.lr": 0.002}
    rows = {"step": [0, 6], "llc/mean": [-1.5, 7.25], "llc/mcse": [0.5, 0.5], "loss/init": [2.5, 2.0]}
    tables = {
        "llc.csv": keys | rows | {"verdict": ["negative", "healthy"]},
        "llc_traces.csv.gz": keys
        | {"step": 6, "chain": 0, "draw": [1, 2], "loss": [1.0, 2.0], "distance": [0.5, 0.75]},
    }
    for name, table in tables.items():
        pd.DataFrame(table).to_csv(folder / name, index=False)
        about = {"runs": {"model_seed=1, optimizer_config.lr=0.002": run}}
        (folder / f"{name.split('.')[0]}.json").write_text(json.dumps(about))


def leave_analyses(folder: Path, run: str) -> None:
    """What `icl analyse` leaves of a run of seed 1."""
    folder.mkdir()
    heads = [(step, 0, head, token) for step in (0, 3) for head in range(2) for token in range(3)]
    attention = pd.DataFrame(heads, columns=pd.Index(["step", "block", "head", "token"]))
    attention = attention.assign(entropy=attention["token"] + attention["head"] / 8)
    spectra = pd.DataFrame({"step": [0, 3], "embed/S/0": [2.5, 3.5], "embed/S/1": [1.5, 0.5], "embed/trace": [4, 5.0]})
    for name, table in {"attention": attention, "spectra": spectra}.items():
        table.insert(0, "model_seed", 1)
        table.to_csv(folder / f"{name}.csv", index=False)
        (folder / f"{name}.json").write_text(json.dumps({"runs": {"1": run}}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "mine.yaml").write_text(SWEEP)
    names = []
    for data in expand(load_sweep(folder / "mine.yaml")):
        config = TrainingConfig.parse(data).resolved()
        checkpoints = Checkpoints(LocalStore(folder), config.name)
        with checkpoints.lock():
            checkpoints.save_config(config.model_dump(mode="json"))
            tracker = LocalTracker(folder / "icl" / config.name)
            train(config, checkpoints, tracker)
            tracker.finish()
            if len(names) < 3:
                checkpoints.mark_finished(config.num_steps - 1)
            else:  # it was stopped after step 3
                checkpoints.store.delete(checkpoints.weights_key(config.num_steps - 1))
                LocalTracker(folder / "icl" / config.name, next_step=4).finish("interrupted")
        names.append(config.name)
    leave_estimates(folder / "icl" / f"llc-{names[0]}-0123abcd", COURSE)
    leave_analyses(folder / "tables", names[0])
    leave_tables(folder / "tables", names[1])
    return folder


@pytest.fixture(autouse=True)
def place(root, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(root))


@pytest.fixture(scope="module")
def material(root):
    names = [TrainingConfig.parse(data).name for data in expand(load_sweep(root / "mine.yaml"))]
    return gather([Run(name, LocalStore(root), root / "icl") for name in names], root / "tables")


@pytest.fixture(scope="module")
def written(root):
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as told:
        patch.setenv("LOCAL_ROOT", str(root))
        path = report_command([str(root / "mine.yaml")], root / "out" / "mine.html", root)
    assert str(path) in told.getvalue()
    return Elements(path.read_text("utf-8"))


def test_every_number_of_the_charts_is_one_of_the_tables(root, written):
    runs = icl.open_runs(root / "mine.yaml")
    for place, run in enumerate(runs):
        for trace in written.traces("training"):
            if trace["meta"]["run"] != place:
                continue
            column = run.metrics.set_index("step")[trace["meta"]["pick"]["show"]].dropna()
            assert [x - 1 for x in trace["x"]] == list(column.index)
            assert trace["y"] == pytest.approx(list(column), rel=1e-6)
    shown = {trace["meta"]["pick"]["show"] for trace in written.traces("training")}
    assert {"batch/loss", "pretrain/mse", "weight/norm"} <= shown
    line = written.traces("estimates")[0]
    estimates = runs[0].estimates
    assert [x - 1 for x in line["x"]] == list(estimates["step"])
    assert line["y"] == list(estimates["llc/mean"])
    assert line["error_y"]["array"] == list(estimates["llc/mcse"])
    assert [text.replace("<br>", " ") for text in line["customdata"]] == list(estimates["verdict"])
    chains = written.traces("chains")
    course = [trace for trace in chains if trace["meta"]["pick"]["step"] == "10,000"]
    assert [trace["y"] for trace in course if trace["name"] == "chain 1"] == [[2, 3, 1.5], [1, 1, 1]]
    along = [trace for trace in written.traces("tokens-along") if trace["meta"]["pick"]["show"].startswith("λ̂")]
    assert [trace["y"] for trace in along] == [
        pytest.approx(list(estimates[f"llc/mean/{k}"]), rel=1e-6) for k in range(3)
    ]


def test_what_was_analysed_is_shown_of_the_run_that_it_was_made_of(written):
    attention = written.traces("attention")
    assert [(trace["x"], trace["y"]) for trace in attention] == [([1, 4], [1, 1]), ([1, 4], [1.125, 1.125])]
    structure = {
        (trace["meta"]["pick"]["show"], trace["name"].rpartition(", ")[2]): (trace["meta"]["run"], trace["y"])
        for trace in written.traces("structure")
    }
    assert structure["spectra: embed/S", "1"] == (0, [1.5, 0.5])
    assert any(key[0] == "spectra: embed/trace" and value == (0, [4, 5]) for key, value in structure.items())


def test_the_stages_are_the_runs_own(material, written):
    stages = material.stages
    assert list(stages["run"].unique()) == [0]
    assert list(stages["stage"]) == ["S1", "S2", "S3"][: len(stages)]
    ends = stages.loc[stages["kind"] != "end", "end_step"]
    assert len(ends) >= 1
    assert ((ends > 300) & (ends < 2000)).any()  # where the course rests and turns
    lines = [trace for trace in written.traces("estimates") if trace["meta"].get("dash") == "dot"]
    assert [trace["x"][0] - 1 for trace in lines] == pytest.approx(list(ends), rel=1e-6)
    assert not [attributes for _, attributes in written.elements if "LR1" in str(attributes)]


def test_the_table_of_runs_says_how_they_differ_and_what_state_they_are_in(material):
    assert set(material.differing) == {"task_config.model_seed", "optimizer_config.lr"}
    assert material.runs["label"].nunique() == 4
    assert list(material.runs["state"]) == ["finished"] * 3 + ["interrupted"]
    assert list(material.runs["steps"]) == [7, 7, 7, 4]
    assert list(material.runs["sequences"]) == [7 * 13, 7 * 13, 7 * 13, 4 * 13]
    assert list(material.runs["healthy"]) == [12, 1, 0, 0]


def test_where_the_estimates_of_a_run_are_gone_its_tables_stand_for_them(material):
    rows = material.estimates.loc[material.estimates["run"] == 1]
    assert rows[["way", "step", "llc/mean"]].to_numpy().tolist() == [["llc", 0, -1.5], ["llc", 6, 7.25]]
    assert material.traces.loc[material.traces["run"] == 1, "loss"].tolist() == [1.0, 2.0]
    assert any("stages need estimates at 8 checkpoints, and there are 2" in note for note in material.notes)


def test_estimates_of_one_sampler_that_differ_otherwise_are_told_apart(root):
    name = TrainingConfig.parse(expand(load_sweep(root / "mine.yaml"))[0]).name
    others = {"aaaaaaaa": {"include": ["unembedding.*"]}, "bbbbbbbb": {"num_burnin_steps": 3}}
    folders = [root / "icl" / f"llc-{name}-{tag}" for tag in (*others, "cccccccc")]
    for folder, course in zip(folders, (range(13), range(100, 113), range(200, 213)), strict=True):
        leave_estimates(folder, [float(each) for each in course])
    for folder, sampler in zip(folders, others.values(), strict=False):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"sampler_config": config["sampler_config"] | sampler}))
    config = json.loads((folders[-1] / "config.json").read_text())
    (folders[-1] / "config.json").write_text(json.dumps(config | {"grad_tasks": "true"}))
    try:
        found = gather([Run(name, LocalStore(root), root / "icl")]).estimates
    finally:
        for folder in folders:
            shutil.rmtree(folder)
    means = found.loc[found["step"] == 0].set_index("way")["llc/mean"]
    assert sorted(means) == [COURSE[0], 0, 100, 200]
    assert ["include" in way for way in means.index].count(True) == 4
    assert means[next(way for way in means.index if "grad_tasks true" in way)] == 200


def test_a_run_with_tables_in_two_folders_is_read_once(root, material, tmp_path):
    names = list(material.runs["name"])
    for folder in ("a", "b"):
        leave_analyses(tmp_path / folder, names[0])
        leave_tables(tmp_path / folder, names[1])
    runs = [Run(name, LocalStore(root), root / "icl") for name in names]
    twice = gather(runs, tmp_path)
    for table in ("estimates", "traces", "structure", "attention"):
        pd.testing.assert_frame_equal(getattr(twice, table), getattr(material, table))
    assert any("another table has these checkpoints" in note for note in twice.notes)


def test_tables_of_one_name_are_told_apart_by_their_sampler_alone(root, material, tmp_path):
    names = list(material.runs["name"])
    made = {"a": (names[1], 1.0, 3), "b": (names[1], 2.0, 3), "c": (names[2], 1.0, 4)}
    for folder, (name, gamma, size) in made.items():
        (tmp_path / folder).mkdir()
        leave_tables(tmp_path / folder, name)
        for about in (tmp_path / folder).glob("*.json"):
            settings = {"sampler_config": {"gamma": gamma}, "task_config": {"task_size": size}}
            about.write_text(json.dumps(json.loads(about.read_text()) | settings))
    found = gather([Run(name, LocalStore(root), root / "icl") for name in names], tmp_path)
    for table in (found.estimates, found.traces):
        assert set(table.loc[table["run"] == 1, "way"]) == {"llc", "llc in b"}
        assert set(table.loc[table["run"] == 2, "way"]) == {"llc"}


def test_tables_of_a_family_are_shown(root, material, tmp_path):
    name = material.runs["name"].iloc[0]
    pd.DataFrame({"num_tasks": 16, "step": [0, 3], "task_prior/zero": [2.5, 1.5]}).to_csv(
        tmp_path / "task_prior.csv", index=False
    )
    (tmp_path / "task_prior.json").write_text(json.dumps({"runs": {"16": name}}))
    shown = gather([Run(name, LocalStore(root), root / "icl")], tmp_path).structure
    assert shown["value"].tolist() == [2.5, 1.5]


def test_the_page_asks_no_server_and_names_the_commands_that_continue(root, written):
    assert not [attributes for _, attributes in written.elements if {"src", "href"} & attributes.keys()]
    policy = next(attributes for attributes in written.all("meta") if "http-equiv" in attributes)
    assert "default-src 'none'" in str(policy["content"])
    content = (root / "out" / "mine.html").read_text("utf-8")
    for command in ("train", "llc", "report"):
        assert f"icl {command} {root / 'mine.yaml'}" in content


def test_the_commands_work_as_they_stand(material, tmp_path):
    run = material.runs["name"].iloc[0]
    lines = dict(continuing(material, [run], [], Path("page.html"), tmp_path))
    assert lines["Write this page again."] == f"LOCAL_ROOT={tmp_path} icl report {run} --output page.html"
    file = next(line for line in lines.values() if line.startswith("runs:"))
    (tmp_path / "llc.yaml").write_text(file)
    points = llc_points(load_sweep(tmp_path / "llc.yaml"))
    assert {point.training.name for point in points} == set(material.runs["name"])
    assert {(point.preset, point.checkpoints) for point in points} == {("automatic", 9)}
    own = dict(continuing(material, [str(tmp_path / "llc.yaml")], [], Path("page.html")))
    assert own["Estimate λ̂ at the remaining checkpoints."] == f"icl llc {tmp_path / 'llc.yaml'}"


def hostile(material: Material) -> Material:
    runs = material.runs.assign(
        name=HOSTILE, label=[f"{HOSTILE}{place}" for place in material.runs["run"]], remark=HOSTILE
    )
    settings = material.settings.assign(setting=HOSTILE, **{"0": HOSTILE})
    estimates = material.estimates.assign(verdict=HOSTILE, way=HOSTILE)
    metrics = material.metrics.assign(**{HOSTILE: 1.5})
    parts = {"runs": runs, "settings": settings, "estimates": estimates, "metrics": metrics}
    return replace(
        material, **parts, stages=material.stages.assign(way=HOSTILE), notes=(HOSTILE,), differing=(HOSTILE,)
    )


def test_what_users_wrote_is_never_markup(material):
    before, after = Elements(page(material)), Elements(page(hostile(material), [(HOSTILE, HOSTILE)], HOSTILE))
    assert len(after.all("script")) == len(before.all("script"))
    assert not after.all("img")
    assert not after.all("b")
    assert after.report()["runs"][1]["label"] == f"{HOSTILE}1"
    for chart in after.report()["charts"]:
        for trace in chart["traces"]:
            assert "<b>" not in trace.get("name", "")
            assert "%{x}" not in trace.get("hovertemplate", "")


def test_equal_runs_give_equal_bytes_and_an_older_page_is_replaced_whole(material, tmp_path):
    path = tmp_path / "deep" / "report.html"
    sizes = [write_report(material, path) for _ in range(2)]
    assert sizes[0] == sizes[1] == path.stat().st_size
    assert path.read_text("utf-8") == page(material)
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_twenty_long_runs_keep_within_five_megabytes_and_no_peak_is_lost(material, tmp_path):
    rng = np.random.default_rng(0)
    steps = np.arange(3000)
    columns = {name: rng.normal(size=len(steps)) for name in material.metrics.columns if name not in ("run", "step")}
    metrics = pd.concat([pd.DataFrame({"step": steps, **columns, "run": run}) for run in range(20)], ignore_index=True)
    peak = 7, 1234
    metrics.loc[(metrics["run"] == peak[0]) & (metrics["step"] == peak[1]), "pretrain/mse"] = 99.5
    runs = pd.concat([material.runs] * 5, ignore_index=True)
    runs = runs.assign(run=range(20), label=[f"run {place}" for place in range(20)])
    estimates = pd.concat([material.estimates.assign(run=run) for run in range(20)], ignore_index=True)
    chain = pd.DataFrame({"chain": np.repeat(range(10), 100), "draw": np.tile(range(100), 10)})
    chain = chain.assign(
        loss=rng.normal(size=1000), distance=rng.normal(size=1000), way=material.estimates["way"].iloc[0]
    )
    traces = pd.concat([chain.assign(run=run, step=step) for run in range(20) for step in STEPS], ignore_index=True)
    large = replace(material, runs=runs, metrics=metrics, estimates=estimates, traces=traces)
    assert write_report(large, tmp_path / "large.html") <= 5e6
    traces = Elements((tmp_path / "large.html").read_text("utf-8")).traces("training")
    line = traces[peak[0]]
    assert (line["meta"]["run"], line["meta"]["pick"]) == (peak[0], {"show": "pretrain/mse"})
    assert dict(zip(line["x"], line["y"], strict=True))[peak[1] + 1] == 99.5
    assert (line["x"][0], line["x"][-1]) == (1, 3000)


def test_a_subject_with_estimates_alone_has_a_page(root, tmp_path):
    folder = root / "icl" / "llc-language-0123abcd"
    leave_estimates(folder, COURSE)
    try:
        report_command(["language"], tmp_path / "language.html", root)
    finally:
        shutil.rmtree(folder)
    elements = Elements((tmp_path / "language.html").read_text("utf-8"))
    assert len(elements.traces("estimates")[0]["x"]) == len(STEPS)
    assert {chart["name"] for chart in elements.report()["charts"]} == {"estimates", "chains", "tokens", "tokens-along"}


def test_a_damaged_run_does_not_keep_the_others_from_being_reported(root, tmp_path):
    folder = root / "icl" / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "0.safetensors").write_bytes(b"no checkpoint")
    try:
        report_command([], tmp_path / "all.html", root)
    finally:
        shutil.rmtree(folder)
    runs = Elements((tmp_path / "all.html").read_text("utf-8")).report()["runs"]
    assert [run["name"] == "damaged" for run in runs].count(True) == 1
    assert len(runs) == 5


def test_what_cannot_be_reported_is_one_line(root, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no run 'nothing'"):
        report_command(["nothing"], tmp_path / "a.html", root)
    with pytest.raises(ValueError, match=r"is a folder; give --output a file"):
        report_command([str(root / "mine.yaml")], tmp_path, root)
    (tmp_path / "other.yaml").write_text(SWEEP.replace("0.002", "0.003").replace("0.01", "0.004"))
    with pytest.raises(ConfigError, match=r"nothing to report: no run of .* has begun; start it with: icl train"):
        report_command([str(tmp_path / "other.yaml")], tmp_path / "a.html", root)
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match="nothing to report: there are no runs"):
        report_command([], tmp_path / "a.html", root)
    assert not (tmp_path / "a.html").exists()


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PRESSED = """\
<script>
const wait = setInterval(() => {
  if (!document.documentElement.dataset.drawn) return;
  clearInterval(wait);
  const lines = () => document.querySelectorAll("#training .scatterlayer .trace").length;
  const before = lines();
  document.querySelector("#switches input").click();
  setTimeout(() => { document.documentElement.dataset.lines = before + " " + lines(); }, 300);
}, 50);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_browser_draws_every_chart_says_nothing_on_its_console_and_switches_a_run_off(material, tmp_path):
    path = tmp_path / "hostile.html"
    path.write_text(
        page(hostile(material), [(HOSTILE, HOSTILE)], "title").replace("</body>", f"{PRESSED}</body>"), "utf-8"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    elements = Elements(done.stdout)
    html = elements.all("html")[0]
    assert html["data-drawn"] == "true"
    assert html["data-lines"] == "4 3"
    assert "<title>title" in done.stdout
    assert sum("main-svg" in str(attributes.get("class")) for attributes in elements.all("svg")) >= 7
