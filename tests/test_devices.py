"""Names become devices, or one clear line."""

import subprocess
import sys

import pytest
import torch

from icl.devices import devices_for_runs, end_of_graph, memory_budget, resolve_device, runs_at_once, seen_alone


def test_cpu_is_the_cpu():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(" CPU ") == torch.device("cpu")


def test_without_a_name_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == resolve_device("") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(None) == torch.device("cuda")


def test_cuda_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match=r"'cuda:2' is not there: 2 CUDA device\(s\) found; use DEVICE=cpu"):
        resolve_device("cuda:2")


def test_a_sweep_shares_all_gpus_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name, expected in {None: [0, 1, 2], "cuda": [0, 1, 2], "cuda:1": [1]}.items():
        device = resolve_device(name)
        assert devices_for_runs(device) == [torch.device("cuda", index) for index in expected]
        assert runs_at_once(device) == len(expected)
    assert devices_for_runs(torch.device("cpu")) == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, "2,0"), ("", "2,0"), ("4,5,7", "7,4"), ("GPU-a,GPU-b,MIG-c", "MIG-c,GPU-a")]
)
def test_a_process_is_shown_its_own_gpus_under_the_names_that_cuda_knows(visible, seen):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = seen_alone([torch.device("cuda", index) for index in (2, 0)], environ)
    assert found == {"CUDA_VISIBLE_DEVICES": seen, "DEVICE": "cuda"}


@pytest.mark.parametrize("name", ["gpu", "tpu", "cuda:", "cuda:-1", "cpu:0", "xla:1", "cuda 1"])
def test_unknown_names_are_one_clear_line(name):
    with pytest.raises(
        ValueError, match=r"unknown device '.*': DEVICE must be cpu, cuda, cuda:<index>, mps or xla"
    ) as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


def test_absent_devices_say_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'mps' is not there"):
        resolve_device("mps")
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ValueError, match="'xla' needs torch_xla"):
        resolve_device("xla")


def test_torch_xla_is_not_imported_unless_asked_for():
    code = "import sys; from icl.devices import resolve_device; resolve_device(); assert 'torch_xla' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_budget_leaves_room():
    assert 0 < memory_budget(torch.device("cpu")) < 2**45
    assert memory_budget(torch.device("meta")) > 0


def test_end_of_graph_is_nothing_on_eager_devices():
    end_of_graph(torch.device("cpu"))
