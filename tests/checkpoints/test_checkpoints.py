"""Checkpoints: exact, equal bytes for equal contents, damaged ones told from good ones, one writer at a time."""

import hashlib
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from icl.checkpoints import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpointError,
    load_reference_checkpoint,
    load_reference_state_dict,
)
from icl.checkpoints.format import FORMAT_VERSION, decode, encode
from icl.checkpoints.runs import verify_run
from icl.config import TrainingConfig
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.model import InContextRegressionTransformer, parameter_layout
from icl.storage import LocalStore, MirroredStore, StorageError
from icl.storage.locks import RunInUseError
from icl.training import first_missing_step

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-format-1.safetensors"
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run-format-1"
SHAPE = {"task_size": 3, "max_examples": 5, "embed_size": 14, "mlp_size": 11, "num_heads": 2, "num_layers": 2}


def example():
    """Every dtype that states use, an empty tensor, a scalar, a transposed view, and views of one memory."""
    flat = torch.arange(35, dtype=torch.float32)
    return {
        "view.first": flat[:15].view(5, 3),
        "view.second": flat[15:].view(4, 5).T,
        "step": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "double": torch.tensor([0.1, float("nan"), float("-inf")], dtype=torch.float64),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
    }


METADATA = {"config": '{"lr": 0.001}', "note": "ü", "nested": {"b": [1, None, 2.5], "a": True}}


def equal(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].contiguous().view(-1).view(torch.uint8).tolist()
        == second[name].contiguous().view(-1).view(torch.uint8).tolist()
        for name in first
    )


@pytest.fixture
def run(tmp_path):
    return Checkpoints(LocalStore(tmp_path), "run")


def test_what_is_saved_is_loaded_bit_for_bit(run):
    run.save(3, example(), METADATA)
    checkpoint = run.read(3)
    assert checkpoint.step == 3
    assert checkpoint.metadata == METADATA
    assert equal(checkpoint.tensors, example())
    assert equal(run.load(3), example())


def test_a_checkpoint_may_begin_like_a_pickle():
    """The first byte of a pickle, 0x80, is the first of a header's length once in 32 lengths."""
    begun = set()
    for length in range(300):
        metadata = {"config": "x" * length}
        data = encode(3, example(), metadata, "state")
        begun.add(data[:1])
        assert decode(data, "file", "state").metadata == metadata
    assert b"\x80" in begun


def test_equal_contents_give_equal_bytes_in_every_process(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_checkpoints as t;"
        "import hashlib; print(hashlib.sha256(t.encode(3, t.example(), t.METADATA, 'weights')).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            check=True, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1",)
    }  # fmt: skip
    here = hashlib.sha256(encode(3, example(), METADATA, "weights")).hexdigest()
    assert digests == {f"{here}\n"}
    reordered = dict(reversed(METADATA.items()))
    assert encode(3, dict(reversed(example().items())), reordered, "state") == encode(3, example(), METADATA, "state")


def test_a_checkpoint_of_format_1_still_loads():
    checkpoint = decode(FIXTURE.read_bytes(), FIXTURE.name, "weights")
    assert checkpoint.step == 3
    assert checkpoint.metadata == METADATA
    assert equal(checkpoint.tensors, example())


def test_an_interrupted_run_of_format_1_still_goes_on(tmp_path):
    """A whole run as this format's first version left it after 10 of 12 steps: nothing it holds is written anew."""
    shutil.copytree(OLD_RUN, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "icl/run").iterdir()}
    config = TrainingConfig.parse(json.loads(before["config.json"]))
    place = Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")
    run = place.checkpoints(config)
    assert first_missing_step(config, run) == 10
    assert run_training(config, place).finished
    assert run.steps() == config.checkpoint_steps()
    assert verify_run(run.store, "run") == []
    kept = {name: data for name, data in before.items() if name[0].isdigit()}
    assert len(kept) == 3
    assert {name: (tmp_path / "icl/run" / name).read_bytes() for name in kept} == kept
    assert (tmp_path / "icl/run/metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"])


def test_10_000_checkpoints_of_the_papers_model_fit_in_2_5_gb(run):
    model = InContextRegressionTransformer(4, 8, 64, 64, 4, 2, seed=0)
    assert sum(value.numel() for value in model.parameters()) == 51_717
    config = TrainingConfig.parse({"task_config": {"num_tasks": "inf", "max_examples": 8}, "num_steps": 500_000})
    run.save(499_999, dict(model.named_parameters()), {"config": config.model_dump_json()})
    size = (run.store.root / run.weights_key(499_999)).stat().st_size
    on_disk = -(-size // 4096) * 4096
    print(f"{size} bytes per checkpoint, {on_disk} in blocks of 4096; 10,000 of them {1e4 * on_disk / 1e9:.2f} GB")
    assert 10_000 * on_disk < 2.5e9


def test_steps_are_sorted_as_numbers_and_states_are_not_among_them(run):
    assert run.steps() == []
    assert run.newest_state() is None
    for step in (100, 9, 10, 0):
        run.save(step, {"w": torch.zeros(2)})
        run.save_state(step, {"w": torch.zeros(2)})
    run.store.put("icl/run/007.safetensors", b"")  # not a name that we give
    assert run.steps() == [0, 9, 10, 100]


def test_the_newest_two_states_are_kept(run, tmp_path):
    for step in range(5):
        run.save_state(step, {"w": torch.full((3,), float(step))}, {"at": step})
    assert run.states() == [3, 4]
    step, tensors, metadata = run.newest_state()
    assert (step, tensors["w"].tolist(), metadata) == (4, [4.0] * 3, {"at": 4})
    again = Checkpoints(LocalStore(tmp_path), "run")
    again.save_state(9, {"w": torch.zeros(3)})
    assert again.states() == [4, 9]


def test_a_damaged_state_gives_way_to_the_one_before_and_later_to_a_new_one(run, caplog):
    for step in (5, 6):
        run.save_state(step, {"w": torch.full((3,), float(step))})
    path = run.store.root / run.state_key(6)
    path.write_bytes(path.read_bytes()[:-1])
    assert run.newest_state().step == 5
    assert "state-6.safetensors is truncated" in caplog.text
    assert "trying the state before it" in caplog.text
    with run.lock():  # training goes on from 5, reaches 5.5 on the way to 6, so to say
        run.store.delete(run.state_key(5))
        run.save_state(4, {"w": torch.zeros(3)})
    assert run.states() == [4]


def test_a_state_of_a_newer_version_is_not_trained_over(run):
    run.save_state(1, {"w": torch.zeros(3)})
    run.store.put(run.state_key(2), forged(format=FORMAT_VERSION + 1, kind="state", step=2))
    with pytest.raises(
        CheckpointError, match=r"state-2.safetensors has format 2, this version of icl reads up to 1; upg"
    ):
        run.newest_state()


def forged(**changes):
    """A safetensors file with a record of our form, changed at will."""
    record = {"format": 1, "kind": "weights", "step": 3, "sha256": "0" * 64, "metadata": {}, **changes}
    return save({"w": torch.zeros(3)}, {"icl": json.dumps(record)})


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def bad_files(tmp_path):
    whole = encode(3, example(), METADATA, "weights")
    position = whole.index(b'"note')
    zipped = tmp_path / "zip"
    torch.save({"model": {"w": torch.zeros(3)}}, zipped)
    pickled = pickle.dumps(Bomb(tmp_path / "exploded"))
    yield "empty", b"", "truncated"
    yield "cut header", whole[:100], "truncated"
    yield "cut data", whole[:-1], "truncated"
    yield "longer", whole + b"\0", "truncated"
    yield "text", b"not a checkpoint at all, but long enough to look at", "truncated or not a checkpoint"
    yield "flipped data", whole[:-1] + bytes([whole[-1] ^ 1]), "wrong checksum"
    yield "flipped record", whole[:position] + b'"nOte' + whole[position + 5 :], "wrong checksum"
    yield "pickle", pickled, "could run code when opened, and was not read"
    yield "torch file", zipped.read_bytes(), "could run code when opened, and was not read"
    yield "foreign", save({"w": torch.zeros(3)}), "of another program"
    yield "foreign entry", save({"w": torch.zeros(3)}, {"icl": "hello"}), "of another program"
    yield "deep", save({"w": torch.zeros(3)}, {"icl": "[" * 100_000}), "of another program"
    yield "record", forged(step=-1), "damaged record"
    yield "types", forged(format="1"), "damaged record"
    yield "other kind", encode(3, example(), METADATA, "state"), "holds 'state', not 'weights'"
    yield "other step", encode(4, example(), METADATA, "weights"), "holds step 4"
    yield "newer", forged(format=99), "has format 99, this version of icl reads up to 1; upgrade icl"


def test_every_bad_file_gives_one_clear_line_and_runs_nothing(run, tmp_path):
    for name, data, message in bad_files(tmp_path):
        run.store.put(run.weights_key(3), data)
        with pytest.raises(CheckpointError) as caught:
            run.load(3)
        assert message in str(caught.value), name
        assert "icl/run/3.safetensors" in str(caught.value), name
        assert "\n" not in str(caught.value), name
        damaged = name not in ("other kind", "newer")
        assert isinstance(caught.value, DamagedCheckpointError) == damaged, name
    assert not (tmp_path / "exploded").exists()


def test_a_missing_step_is_named_and_is_no_damage(run):
    with pytest.raises(CheckpointError, match=r"the run run has no checkpoint at step 3; it has none yet") as caught:
        run.load(3)
    assert not isinstance(caught.value, DamagedCheckpointError)
    for step in (2, 29):
        run.save(step, example())
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at step 5000; the nearest is at step 29 \(`icl runs show"
    ) as caught:
        run.load(5000)
    assert not isinstance(caught.value, DamagedCheckpointError)
    with pytest.raises(CheckpointError, match=r"the run run has no state icl/run/state-3\.safetensors"):
        run.read_state(3)


def test_another_architecture_is_named(tmp_path):
    model = InContextRegressionTransformer(**SHAPE, seed=0)
    layout = {name: size for name, (_, size) in parameter_layout(model.shape).items()}
    run = Checkpoints(LocalStore(tmp_path), "run", layout)
    run.save(1, dict(model.named_parameters()))
    assert run.load(1).keys() == layout.keys()
    other = InContextRegressionTransformer(**{**SHAPE, "mlp_size": 13}, layer_norm=False, seed=0)
    run.save(2, dict(other.named_parameters()))
    with pytest.raises(
        CheckpointError, match=r"is of a different architecture: .* is missing; .* and 13 more differences"
    ):
        run.load(2)
    run.save(3, {**dict(model.named_parameters()), "unembedding.bias": torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"unembedding.bias has shape \(5,\) instead of \(4,\); load it with the"):
        run.load(3)


def test_what_cannot_be_written_is_refused(run):
    for step, metadata in ((-1, {}), (True, {}), (1.0, {}), (1, {"x": object()})):
        with pytest.raises(CheckpointError):
            run.save(step, {"w": torch.zeros(3)}, metadata)
    for name in ("", "..", "a/b", ".hidden", "a b"):
        with pytest.raises(CheckpointError, match=r"the run name .* is refused"):
            Checkpoints(run.store, name)
    assert run.store.list() == []


def test_the_configuration_is_readable_beside_the_checkpoints(run):
    assert run.config() is None
    assert run.finished_step() is None
    run.save_config({"b": 1, "a": {"c": [1, 2]}})
    assert (
        json.loads((run.store.root / "icl/run/config.json").read_text()) == {"a": {"c": [1, 2]}, "b": 1} == run.config()
    )
    run.mark_finished(22)
    assert run.finished_step() == 22
    for bad in (b"{", b"[1]", b"[" * 100_000):
        run.store.put("icl/run/config.json", bad)
        with pytest.raises(CheckpointError, match=r"config\.json is not JSON|not a JSON object"):
            run.config()


HOLD = """
import sys, time
from icl.checkpoints import Checkpoints
from icl.storage import LocalStore
with Checkpoints(LocalStore(sys.argv[1]), "run").lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_holder_is_forgotten(run, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        message = rf"the run run is in use by process {process.pid} on {socket.gethostname()} since 20.*; wait for it"
        with pytest.raises(RunInUseError, match=message), run.lock(wait_s=0.1):
            pass
        assert run.holder().pid == process.pid
        process.kill()
    assert run.holder() is None
    (tmp_path / "icl/run/.1.safetensors.99-ab.tmp").write_bytes(b"left by the dead")
    with run.lock():
        assert run.holder().pid == os.getpid()
        assert not list(tmp_path.rglob("*.tmp"))
    assert run.holder() is None


def test_looking_for_a_holder_creates_nothing(run, tmp_path):
    assert run.holder() is None
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot lock .*: a file stands where a folder is needed"):
        Checkpoints(LocalStore(tmp_path / "file"), "run").lock().__enter__()


def test_members_of_an_ensemble_do_not_share_anything(tmp_path):
    members = [Checkpoints(LocalStore(tmp_path), f"run-seed{seed}") for seed in range(3)]
    with members[0].lock(), members[1].lock(), members[2].lock():
        for seed, member in enumerate(members):
            member.save(seed, {"w": torch.tensor([float(seed)])})
    assert [member.steps() for member in members] == [[0], [1], [2]]


def test_a_run_goes_on_from_the_remote_alone(tmp_path):
    first = Checkpoints(MirroredStore(LocalStore(tmp_path / "a"), LocalStore(tmp_path / "remote")), "run")
    with first.lock():
        for step in range(4):
            first.save(step, {"w": torch.full((3,), float(step))})
            first.save_state(step, {"w": torch.full((3,), float(step))})
        assert first.flush(10) == ()
    second = Checkpoints(MirroredStore(LocalStore(tmp_path / "b"), LocalStore(tmp_path / "remote")), "run")
    with second.lock():
        assert second.steps() == [0, 1, 2, 3]
        assert second.newest_state().tensors["w"].tolist() == [3.0] * 3
        second.save_state(4, {"w": torch.zeros(3)})
        assert second.flush(10) == ()
    assert Checkpoints(LocalStore(tmp_path / "remote"), "run").states() == [3, 4]


# Files of the reference code


def reference_state(model):
    """The inverse of the renaming, written by hand from the reference code's names."""
    names = {
        "token_embedding": "token_embedding", "position_embedding": "postn_embedding", "final_norm": "unembedding.0",
        "unembedding": "unembedding.1" if model.shape.layer_norm else "unembedding",
        **{f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(model.shape.num_layers) for ours, theirs in (
            ("attention_norm", "layer_norms.0"), ("mlp_norm", "layer_norms.1"), ("attention.qkv", "attention.attention"),
            ("attention.output", "attention.output"), ("mlp.up", "compute.0"), ("mlp.down", "compute.2"))},
    }  # fmt: skip
    state = {}
    for name, value in model.named_parameters():
        layer, kind = name.rsplit(".", 1)
        state[f"token_sequence_transformer.{names[layer]}.{kind}"] = value.detach().clone()
    for layer in range(model.shape.num_layers):
        state[f"token_sequence_transformer.blocks.{layer}.attention.causal_mask"] = torch.ones(10, 10)
    return state


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("include_output", [True, False])
def test_reference_weights_load_under_our_names(layer_norm, include_output):
    options = {**SHAPE, "layer_norm": layer_norm, "include_output": include_output}
    theirs = InContextRegressionTransformer(**options, seed=1)
    ours = InContextRegressionTransformer(**options, seed=2)
    assert load_reference_state_dict(ours, reference_state(theirs)) is ours
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_reference_state_that_does_not_fit_is_named_and_changes_nothing():
    model = InContextRegressionTransformer(**SHAPE, seed=2)
    before = [value.detach().clone() for value in model.parameters()]
    good = reference_state(InContextRegressionTransformer(**SHAPE, seed=1))
    root = "token_sequence_transformer."
    for change, message in (
        ({f"{root}unembedding.1.bias": torch.zeros(7)}, r"unembedding.bias has shape \(7,\) instead of \(4,\)"),
        ({f"{root}strange": torch.zeros(7)}, "strange is not expected"),
        ({f"{root}unembedding.bias": torch.zeros(4)}, "holds unembedding.bias twice"),
        ({"optimizer": {}}, "'optimizer' of the reference state is not a named tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_reference_state_dict(model, {**good, **change})
    good.pop(f"{root}postn_embedding.weight")
    with pytest.raises(CheckpointError, match=r"position_embedding\.weight is missing"):
        load_reference_state_dict(model, good)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_reference_files_load_without_running_code(tmp_path):
    model = InContextRegressionTransformer(**SHAPE, seed=1)
    optimizer = torch.optim.Adam(model.parameters())
    content = {
        "model": reference_state(model), "optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 3},
        "rng_state": [1, 2, 3], "metadata": {"step": 3},
    }  # fmt: skip
    torch.save(content, tmp_path / "good.pt")
    assert load_reference_checkpoint(tmp_path / "good.pt").keys() == content["model"].keys()
    torch.save({**content, "metadata": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": 3}, tmp_path / "number.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello", "world")
    for name, message in {
        "bomb.pt": "asks to run code, and was not loaded",
        "bomb.pkl": "asks to run code, and was not loaded",
        "cut.pt": "truncated or not a PyTorch file",
        "empty.pt": "truncated or not a PyTorch file",
        "zip.pt": "truncated or not a PyTorch file",
        "list.pt": "has no entry 'model'",
        "number.pt": "has no entry 'model'",
        "none.pt": "there is no file",
        ".": "cannot read",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load_reference_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_nothing_is_logged_at_work_that_goes_well(run, caplog):
    caplog.set_level(logging.DEBUG, logger="icl")
    with run.lock():
        run.save(0, {"w": torch.zeros(2)})
        run.save_state(0, {"w": torch.zeros(2)})
        run.load(0)
        run.newest_state()
    assert [record for record in caplog.records if record.name.startswith("icl")] == []
