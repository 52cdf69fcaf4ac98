"""`icl analyse` on language models: a folder of public files, and a run."""

import numpy as np
import pandas as pd
import pytest
import torch

from icl.commands.analyse import analyse_command
from icl.config import ConfigError
from icl.config.kinds import parse_training
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.subjects.language import AttentionOnlyTransformer, LanguageShape

SHAPE = LanguageShape(n_layers=2, d_model=11, n_heads=3, d_head=5, n_ctx=19, d_vocab=17)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "public"
    folder.mkdir()
    for step in (0, 100):
        torch.save(
            AttentionOnlyTransformer(**vars(SHAPE), seed=step).state_dict(), folder / f"checkpoint_{step:0>7d}.pth"
        )
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 17, (29, 19)))
    return folder


def test_a_folder_of_public_files(folder, tmp_path, capsys):
    paths = analyse_command(str(folder), None, tmp_path / "out", {}, tmp_path / "rows.npy")
    assert [str(path) for path in paths.values()] == capsys.readouterr().out.split()
    behaviour, losses, heads = (pd.read_csv(paths[name]) for name in ("behaviour", "token_losses", "heads"))
    assert behaviour["step"].tolist() == [0, 100]
    assert (behaviour["bigram_score"] > behaviour["bigram_entropy"]).all()
    assert behaviour["test/loss"].to_numpy() == pytest.approx(losses.filter(like="loss/").mean(axis=1).to_numpy())
    assert len(heads) == 2 * 2 * 3
    assert heads["k_composition"].isna().equals(heads["block"] == 0)
    largest = heads.groupby("step")["prefix_matching"].max()
    assert behaviour["prefix_matching/max"].to_numpy() == pytest.approx(largest.to_numpy())


def test_what_is_measured_is_not_measured_again(folder, tmp_path, monkeypatch):
    analyse_command(str(folder), None, tmp_path / "out", {}, tmp_path / "rows.npy")
    before = (tmp_path / "out" / "heads.csv").read_bytes()
    monkeypatch.setattr("icl.analysis.language.measure_language", None)
    analyse_command(str(folder), None, tmp_path / "out", {}, tmp_path / "rows.npy")
    assert (tmp_path / "out" / "heads.csv").read_bytes() == before


def test_a_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "In the beginning was the word, and the word was long; and so were many other words after it. " * 30
    )
    config = parse_training(
        {
            "task_config": {
                "task_type": "language", "n_layers": 1, "d_model": 11, "n_heads": 3, "d_head": 5, "n_ctx": 19, "d_vocab": 270,
                "tokens": {"text": [str(text)]}, "held_out": 7,
            },
            "num_steps": 3, "batch_size": 5, "checkpointer_config": {"checkpoint_steps": {"linear_space": 2}},
        }
    )  # fmt: skip
    place = Surroundings.from_environment({"LOCAL_ROOT": str(tmp_path), "DEVICE": "cpu"}, tracking="local")
    outcome = run_training(config, place)
    assert outcome.finished
    paths = analyse_command(outcome.name, None, tmp_path / "out", {"LOCAL_ROOT": str(tmp_path), "DEVICE": "cpu"})
    behaviour = pd.read_csv(paths["behaviour"])
    assert behaviour["step"].tolist()[-1] == 2
    assert behaviour["test/loss"].iloc[-1] == pytest.approx(outcome.summary["test/loss"])
    assert any(name.startswith("ngram_loss/") for name in behaviour)


def test_wrong_input(folder, tmp_path):
    with pytest.raises(ConfigError, match="add --tokens"):
        analyse_command(str(folder), None, tmp_path / "out", {})
    np.save(tmp_path / "large.npy", np.full((3, 19), 17))
    with pytest.raises(ConfigError, match="the token 17; with d_vocab=17"):
        analyse_command(str(folder), None, tmp_path / "out", {}, tmp_path / "large.npy")
