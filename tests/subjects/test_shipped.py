"""The subjects that come with the library: a folder of checkpoints, and files of the reference code."""

import pytest
import safetensors.torch
import torch
from torch import nn

from icl.checkpoints import CheckpointError
from icl.config import ConfigError
from icl.model import InContextRegressionTransformer
from icl.sampling import SamplerConfig
from icl.subjects import inputs_of
from icl.subjects.named import make_subject

MINE = """
import torch
from torch import nn

def network(width=3):
    return nn.Sequential(nn.Linear(2, width), nn.Dropout(0.5), nn.Linear(width, 1))

def loss(predict, batch):
    return predict(batch).square().mean()

def data():
    return [torch.ones(5, 2)]
"""
OWN = {"model": "mine:network", "model_settings": {"width": 4}, "loss": "mine:loss", "batches": "mine:data"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("suffix", "key"), [("safetensors", None), ("pt", None), ("pth", "model"), ("pt", "state.model")]
)
def test_a_folder_of_checkpoints_is_a_subject(folder, suffix, key):
    for step in (7, 100):
        content = network(step).state_dict()
        if suffix == "safetensors":
            safetensors.torch.save_file(content, folder / f"net2_step-{step}.{suffix}")
        else:
            for name in reversed(key.split(".") if key else []):
                content = {name: content, "epoch": 3}
            torch.save(content, folder / f"net2_step-{step}.{suffix}")
    for path in ("runs", f"runs/*.{suffix}"):
        subject = make_subject("checkpoints", {"path": path, "key": key, **OWN})
        assert subject.steps() == [7, 100]
        model = subject.model(100)
        assert torch.equal(model[0].weight, network(100)[0].weight)
        assert not model.training
        assert len(subject.batches(7)) == 1
    folder.rename("runs[1]")
    assert make_subject("checkpoints", {"path": "runs[1]", "key": key, **OWN}).steps() == [7, 100]


def test_what_is_wrong_with_a_folder_is_one_line(folder):
    with pytest.raises((ConfigError, CheckpointError), match="there are no checkpoints"):
        make_subject("checkpoints", {"path": "runs", **OWN})
    torch.save({"model": network(1).state_dict(), "lr": 0.1}, folder / "1.pt")
    subject = make_subject("checkpoints", {"path": "runs", **OWN})
    with pytest.raises((ConfigError, CheckpointError), match="name the entry that holds the weights as key"):
        subject.model(1)
    with pytest.raises((ConfigError, CheckpointError), match="has no entry 'weights'; it has model, lr"):
        make_subject("checkpoints", {"path": "runs", "key": "weights", **OWN}).model(1)
    with pytest.raises((ConfigError, CheckpointError), match="does not fit the module"):
        make_subject("checkpoints", {"path": "runs", "key": "model", **OWN, "model_settings": {}}).model(1)
    (folder / "2.pt").write_bytes(b"no checkpoint")
    with pytest.raises((ConfigError, CheckpointError), match="is damaged"):
        make_subject("checkpoints", {"path": "runs", "key": "model", **OWN}).model(2)
    (folder / "final.pt").write_bytes(b"")
    with pytest.raises((ConfigError, CheckpointError), match="has no step in its name"):
        make_subject("checkpoints", {"path": "runs", **OWN})
    with pytest.raises((ConfigError, CheckpointError), match=r"unknown key 'subject_config.pat'"):
        make_subject("checkpoints", {"pat": "runs", **OWN})


def test_files_of_the_reference_code_are_a_subject(folder):
    from icl.sampling.patterns import reference_name

    task = {
        "task_size": 2,
        "max_examples": 3,
        "embed_size": 8,
        "mlp_size": 5,
        "num_heads": 2,
        "num_layers": 1,
        "num_tasks": "inf",
    }
    model = InContextRegressionTransformer(2, 3, 8, 5, 2, 1, layer_norm=True, include_output=False, seed=5)
    state = {reference_name(name): value for name, value in model.state_dict().items()}
    torch.save({"model": state, "optimizer": {}}, folder / "59.pt")
    subject = make_subject("reference", {"path": "runs", "task_config": task})
    assert subject.steps() == [59]
    for name, value in subject.model(59).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    inputs = inputs_of(subject, 59, SamplerConfig(init_seed=3, grad_batch_size=7))
    assert inputs.batches(0)[0].shape == (7, 3, 2)
    (folder / "60.pt").write_bytes(b"no checkpoint")
    with pytest.raises((ConfigError, CheckpointError), match="was not loaded"):
        make_subject("reference", {"path": "runs", "task_config": task}).model(60)
