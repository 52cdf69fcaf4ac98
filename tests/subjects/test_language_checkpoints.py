"""Public checkpoint files of the language model: both forms are read, as weights only; all else is a clear error."""

import collections
import pickle

import pytest
import torch
from safetensors.torch import save_file

from icl.checkpoints import CheckpointError
from icl.subjects.language import AttentionOnlyTransformer, LanguageShape
from icl.subjects.language_checkpoints import FolderCheckpoints, load_model, load_weights

SHAPE = LanguageShape(n_layers=2, d_model=11, n_heads=3, d_head=5, n_ctx=13, d_vocab=17)


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def public_state(seed=3):
    """As TransformerLens saves it: weights, and two buffers of each block."""
    state = collections.OrderedDict(AttentionOnlyTransformer(**vars(SHAPE), seed=seed).state_dict())
    for layer in range(SHAPE.n_layers):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(SHAPE.n_ctx, SHAPE.n_ctx).tril().bool()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(float("-inf"))
    return state


def equal_weights(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["bare", "with an optimiser"])
@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_both_forms_of_file(tmp_path, form, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    for step in (0, 100, 50_000):
        state = public_state(step)
        optimiser = torch.optim.AdamW(AttentionOnlyTransformer(**vars(SHAPE)).parameters()).state_dict()
        content = state if form == "bare" else {"model_state_dict": state, "optimizer_state_dict": optimiser}
        torch.save(content, folder / f"checkpoint_{step:0>7d}.pth")
    (folder / "README.md").write_text("no checkpoint")
    checkpoints = FolderCheckpoints(tmp_path)
    assert checkpoints.steps() == [0, 100, 50_000]
    for step in checkpoints.steps():
        model = load_model(checkpoints.path(step))
        assert model.shape == SHAPE
        assert equal_weights(model, public_state(step))


def test_half_precision_becomes_single(tmp_path):
    path = tmp_path / "checkpoint_0000007.safetensors"
    state = {name: value.half() for name, value in AttentionOnlyTransformer(**vars(SHAPE), seed=3).state_dict().items()}
    save_file(state, path)
    loaded = load_weights(path)
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(value, state[name].float()) for name, value in loaded.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_does_not_run(tmp_path, zipped):
    path, trap = tmp_path / "checkpoint_0000100.pth", tmp_path / "exploded"
    content = {"model_state_dict": public_state(), "optimizer_state_dict": Bomb(trap)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="asks to run code, and was not loaded"):
        load_model(path)
    assert not trap.exists()


def test_a_damaged_file(tmp_path):
    path = tmp_path / "checkpoint_0000100.pth"
    torch.save(public_state(), path)
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"checkpoint_0000100\.pth"):
            load_model(path)


def without(name):
    state = public_state()
    del state[name]
    return state


OTHERS = {
    "a list": ([1, 2], "neither weights by name nor a model_state_dict"),
    "nothing": ({}, "neither weights by name nor a model_state_dict"),
    "another key": ({"state": public_state()}, "neither weights by name nor a model_state_dict"),
    "one tensor": (torch.zeros(3), "neither weights by name nor a model_state_dict"),
    "another model": ({"weight": torch.zeros(3)}, r"embed\.W_E is missing"),
    "a missing weight": (without("blocks.1.attn.W_O"), r"blocks\.1\.attn\.W_O is missing"),
    "a missing block": (without("blocks.1.attn.W_Q"), r"blocks\.1\.ln1\.w is not expected"),
    "an MLP": ({**public_state(), "blocks.0.mlp.W_in": torch.zeros(2)}, r"blocks\.0\.mlp\.W_in is not expected"),
    "another shape": (
        {**public_state(), "unembed.b_U": torch.zeros(19)},
        r"unembed\.b_U has shape \(19,\) instead of \(17,\)",
    ),
    "an odd shape": ({**public_state(), "embed.W_E": torch.zeros(19)}, "expected 2, 2 and 3 axes"),
    "whole numbers": (
        {**public_state(), "unembed.b_U": torch.zeros(17, dtype=torch.long)},
        "holds torch.int64, not weights",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_any_other_file_is_a_clear_error(tmp_path, case):
    content, message = OTHERS[case]
    path = tmp_path / "checkpoint_0000100.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_folders_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        FolderCheckpoints(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; its files are called checkpoint_0000100\.pth"):
        FolderCheckpoints(tmp_path)
    for name in ("checkpoint_0000100.pth", "checkpoint_100.pth"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="both of step 100"):
        FolderCheckpoints(tmp_path)


def test_a_step_that_is_not_there(tmp_path):
    (tmp_path / "checkpoint_0000100.pth").touch()
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are 100"):
        FolderCheckpoints(tmp_path).path(7)


@pytest.mark.parametrize("name", ["checkpoint_0000100.pth", "checkpoint_0000100.safetensors"])
def test_a_file_that_went_away(tmp_path, name):
    with pytest.raises(CheckpointError, match="there is no file"):
        load_model(tmp_path / name)
