"""The calibration grids of data/calibration are what the commands in the sweep files' headers make, and every column is described."""

import json
import re
import shlex
import subprocess
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from icl.analysis.climb import estimates_so_far
from icl.analysis.run_tables import keys_of, label_of, values_of
from icl.config.sweeps import Config, expand, load_sweep, with_overrides
from icl.estimation import LLCConfig
from icl.estimation.kept import settings_of
from icl.execution.points import choice_overrides
from icl.figures.families import GRIDS, read_table, table_names

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "data" / "calibration"
SWEEPS = sorted(path for path in (ROOT / "sweeps").rglob("*.yaml") if "data/calibration" in path.read_text())


def options(words: list[str], name: str) -> list[str]:
    """The values of an option that may be repeated."""
    return [value for word, value in pairwise(words) if word == name]


@cache
def commands_of(path: Path) -> list[list[str]]:
    """The commands of `icl` that the shell lines in a file's header run, word by word."""
    lines = [line[4:] for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#   ")]
    said = 'icl() { printf "%q " "$@"; echo; }\n' + "\n".join(lines)
    done = subprocess.run(["bash", "-euc", said], cwd=ROOT, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


@cache
def points_of(file: str) -> list[Config]:
    return expand(load_sweep(ROOT / file))


def configs_of(words: list[str]) -> list[LLCConfig]:
    """The estimates that one command is about."""
    _, file, *rest = words
    steps = next(iter(options(rest, "--steps")), None)
    overrides = [*choice_overrides(None, None, steps, False), *options(rest, "--set")]
    return [LLCConfig.parse(data) for data in with_overrides(points_of(file), overrides)]


def made_by() -> dict[str, tuple[Path, list[str]]]:
    """Table -> the sweep file and the command that wrote it."""
    return {
        name: (path, words)
        for path in SWEEPS
        for words in commands_of(path)
        if words[0] == "tabulate"
        for name in options(words, "--name")
    }


def test_every_table_has_a_command_and_a_figure_and_nothing_else_is_there():
    assert set(made_by()) == set(GRIDS)
    assert set(table_names(FOLDER)) == {f"{name}{kind}" for name in GRIDS for kind in ("", "_traces")}


@pytest.mark.parametrize("name", GRIDS)
def test_a_table_holds_the_estimates_of_the_commands_in_its_header_under_their_settings(name):
    path, tabulate = made_by()[name]
    rows, made = read_table(FOLDER, name), json.loads((FOLDER / f"{name}.json").read_text())
    keys = keys_of(rows)
    shared = made["sampler_config"]
    expected = set()
    for words in commands_of(path):
        if words[0] != "llc":
            continue
        for config in configs_of(words):
            sampler = config.sampler_config.decisive()
            if any(sampler[key] != value for key, value in shared.items()):
                continue  # of the other table of this file
            steps = [config.step] if config.steps is None else config.steps
            label = label_of(values_of(settings_of(config), keys))
            expected |= {(label, step) for step in steps}
    labels = [
        label_of(dict(zip(keys, row, strict=True))) for row in rows[list(keys)].itertuples(index=False, name=None)
    ]
    assert sorted(zip(labels, rows["step"], strict=True)) == sorted(expected)
    assert set(options(tabulate, "--set")) >= {"sampler_config.num_chains=2"}
    assert set(rows["chains"]) == {2}


@pytest.mark.parametrize("name", GRIDS)
def test_an_estimate_is_the_excess_loss_of_its_chains(name):
    rows, traces = read_table(FOLDER, name), read_table(FOLDER, f"{name}_traces")
    keys = [*keys_of(rows), "step"]
    lost = rows["chains/lost"] == rows["chains"]
    assert rows["llc/mean"].isna().tolist() == lost.tolist()
    assert (traces.groupby(keys)["chain"].nunique() == rows["chains"].iloc[0]).all()
    kept = rows[~lost]
    last = estimates_so_far(traces.merge(kept[keys], on=keys), kept).groupby(keys).last()
    for column in ("loss/mean", "llc/mean"):
        found = last[column].loc[list(kept[keys].itertuples(index=False, name=None))]
        np.testing.assert_allclose(found, kept[column], rtol=1e-3, atol=0.01)


@pytest.mark.parametrize("name", [f"{grid}{kind}" for grid, kind in product(GRIDS, ("", "_traces"))])
def test_the_dictionary_describes_every_column(name):
    text = (ROOT / "data" / "README.md").read_text()
    described = " ".join(
        text.split(f"\n## {section}\n")[1].split("\n## ")[0] for section in ("calibration", "llc", "llc_traces")
    )
    names = [
        re.compile(re.sub(r"\\\{\w\\\}", r"\\d+", re.escape(each))) for each in re.findall(r"`([^`]+)`", described)
    ]
    columns = set(read_table(FOLDER, name).columns) - {"model_seed", "step"}
    assert not [column for column in columns if not any(each.fullmatch(column) for each in names)]


def test_the_setting_of_the_highlights_is_in_the_table_of_the_published_estimator():
    llc = pd.read_csv(ROOT / "data" / "L2H4Minf" / "llc.csv")
    last = llc[(llc["step"] == 499_999) & llc["model_seed"].isin([0, 1])]
    assert last["chains"].tolist() == [10, 10]
    assert {507, 3247} <= set(llc["step"])
