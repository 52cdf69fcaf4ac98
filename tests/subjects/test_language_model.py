"""The language model as a subject: public files and rows of tokens in, estimates out."""

import numpy as np
import pytest
import torch

from icl.checkpoints import CheckpointError
from icl.config import ConfigError
from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.online import artefact
from icl.sampling.presets import PRESETS
from icl.subjects.language import AttentionOnlyTransformer, LanguageShape
from icl.subjects.language_model import LanguageModel

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
