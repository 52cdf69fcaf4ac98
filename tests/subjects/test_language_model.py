"""The language model as a subject: public files and rows of tokens in, estimates out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from icl.checkpoints import CheckpointError
from icl.commands.sweep import run_sweep_command
from icl.config import ConfigError
from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.online import artefact
from icl.sampling.presets import PRESETS
from icl.subjects.language import AttentionOnlyTransformer, LanguageShape
from icl.subjects.language_model import LanguageModel
from icl.tracking import read_metrics

SHAPE = LanguageShape(n_layers=2, d_model=11, n_heads=3, d_head=5, n_ctx=13, d_vocab=17)


@pytest.fixture
def settings(tmp_path):
    for step in (0, 100):
        state = AttentionOnlyTransformer(**vars(SHAPE), seed=step).state_dict()
        torch.save({"model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / f"checkpoint_{step:0>7d}.pth")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 17, (29, 13)))
    return {"folder": str(tmp_path), "tokens": {"rows": str(tmp_path / "rows.npy")}, "batch_size": 7}


def test_it_has_what_a_subject_has(settings):
    subject = LanguageModel(**settings)
    assert subject.steps() == [0, 100]
    model = subject.model(100)
    assert model.shape == SHAPE
    (tokens,) = subject.batches(100)(3)
    assert tokens.shape == (7, 13)
    assert subject.loss(model, (tokens,)).shape == (12,)
    assert 2 < subject.reference_loss < np.log(17)
    again = LanguageModel(**settings).batches(0)
    assert torch.equal(again(3)[0], tokens)


def test_an_estimate_with_the_published_preset(settings):
    """Of the published protocol, on fewer and shorter chains: raw less corrected is the artefact."""
    subject = LanguageModel(**settings)
    preset = PRESETS["published-language"]
    sampler = SamplerConfig.parse({**preset.model_dump(exclude_unset=True), "num_chains": 3, "num_draws": 5})
    result = estimate_llc(
        subject.model(0), subject.loss, subject.batches(0), sampler, reference_loss=subject.reference_loss
    )
    added, _ = artefact(preset.inverse_temperature, 3, 5, result.init_loss)
    assert result.llc_mean - result.llc_corrected == pytest.approx(added)
    assert abs(result.llc_corrected) < 0.2 * added
    assert not result.verdict.trusted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": None}, "either folder, or repository"),
        ({"repository": "a/b"}, "either folder, or repository"),
        ({"folderr": "x"}, "unknown key 'folderr': did you mean 'folder'"),
        ({"tokens": {"row": "x"}}, r"unknown key 'tokens\.row'"),
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        LanguageModel(**{**settings, **changes})


def test_wrong_places(settings, tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        LanguageModel(**{**settings, "folder": str(tmp_path / "absent")}).steps()
    with pytest.raises(ConfigError, match="there is no file"):
        LanguageModel(**{**settings, "tokens": {"rows": "absent.npy"}}).batches(0)


def test_the_sweep_of_a_local_folder_through_icl_llc(settings, tmp_path, monkeypatch):
    """The shipped file, on a folder of public files, with short chains: raw and corrected under one setting, a verdict under both."""
    sweep = Path(__file__).parents[2] / "sweeps" / "analysis" / "language-llcs-local.yaml"
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "out"))
    monkeypatch.setenv("DEVICE", "cpu")
    told = [
        f"subject_config.folder={settings['folder']}",
        f"subject_config.tokens.rows={settings['tokens']['rows']}",
        "subject_config.batch_size=7",
        "steps=[0, 100]",
        *("sampler_config.num_draws=8", "sampler_config.num_chains=2"),
    ]
    short = ["preset=calibrated-language", "sampler_config.num_burnin_steps=8", "sampler_config.target_error=null"]
    for more in ([], short):
        assert run_sweep_command("llc", sweep, 0, [*told, *more], 1, "local", "local") == 0
    rows = [pd.DataFrame(read_metrics(folder)) for folder in (tmp_path / "out" / "icl").iterdir()]
    published = next(table for table in rows if "llc/corrected" in table)
    calibrated = next(table for table in rows if "llc/corrected" not in table)
    for table in (published, calibrated):
        assert table["step"].tolist() == [0, 100]
        assert table["verdict"].notna().all()
    added, _ = artefact(PRESETS["published-language"].inverse_temperature, 2, 8, 1.0)
    assert (published["llc/mean"] - published["llc/corrected"]).to_numpy() == pytest.approx(
        added * published["loss/init"].to_numpy()
    )
