"""The language model goes through the same loop: equal to a textbook loop, exact to resume, found by its commands."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.runs import list_runs
from icl.config import ConfigError, TrainingConfig
from icl.config.kinds import parse_training
from icl.config.language import LanguageTraining
from icl.execution.opened import open_run
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore
from icl.streams import Stream
from icl.subjects.language import AttentionOnlyTransformer
from icl.subjects.language_checkpoints import FolderCheckpoints, load_model
from icl.subjects.tokens import RowBatches, split, token_rows
from icl.tracking import LocalTracker, read_metrics
from icl.training import Member, train, train_members
from icl.training.kinds import language_shape, sizes_of

TEXT = (
    "In the beginning was the word, and the word was long; and the end of the word was the beginning of another. " * 20
)


@pytest.fixture
def config(tmp_path) -> LanguageTraining:
    (tmp_path / "text.txt").write_text(TEXT)
    data = {
        "task_config": {
            "task_type": "language", "n_layers": 2, "d_model": 11, "n_heads": 3, "d_head": 5, "n_ctx": 13, "d_vocab": 270,
            "tokens": {"text": [str(tmp_path / "text.txt")]}, "held_out": 7, "shuffle": True,
        },
        "num_steps": 23,
        "batch_size": 5,
        "optimizer_config": {"optimizer_type": "AdamW", "lr": 0.01, "weight_decay": 0.05},
        "checkpointer_config": {"checkpoint_steps": {"linear_space": 5}, "state_every": 7},
        "logger_config": {"logging_steps": {"linear_space": 4}, "loss_every": 3},
    }  # fmt: skip
    config = parse_training(data)
    assert isinstance(config, LanguageTraining)
    return config.resolved()


def run(config, root, stop_after=None):
    checkpoints = Checkpoints(LocalStore(root), config.name, sizes_of(config))
    with checkpoints.lock():
        steps = itertools.count()
        tracker = LocalTracker(root / "icl" / config.name, 0)
        should_stop = (lambda: False) if stop_after is None else (lambda: next(steps) >= stop_after)
        return train(config, checkpoints, tracker, should_stop=should_stop)


def files(root, config):
    return {
        path.name: path.read_bytes() for path in (root / "icl" / config.name).iterdir() if path.suffix == ".safetensors"
    }


def test_the_loop_equals_a_textbook_loop(config, tmp_path):
    run(config, tmp_path / "run")
    model = AttentionOnlyTransformer(**vars(language_shape(config.task_config)), seed=0)
    rows = token_rows(config.task_config.tokens, 13, 270)
    train_rows, held = split(len(rows), 7)
    order = Stream(config.task_config.sampling_seed, "training/order")
    batches = RowBatches(rows, 5, train_rows, order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    losses = []
    for step in range(23):
        (tokens,) = batches(step)
        loss = cross_entropy(model(tokens)[:, :-1].reshape(-1, 270), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    folder = tmp_path / "run" / "icl" / config.name
    trained = load_model(FolderCheckpoints(folder).path(22))
    # Not weight by weight: no logit depends on the keys' biases, so AdamW scales up the rounding of their gradients.
    torch.testing.assert_close(trained(rows[held]), model(rows[held]), rtol=1e-3, atol=1e-4)
    rows_logged = {row["step"]: row for row in read_metrics(folder)}
    for step, row in rows_logged.items():
        assert row["batch/loss"] == pytest.approx(losses[step], rel=1e-4)
    tokens = rows[held]
    with torch.no_grad():
        test = cross_entropy(model(tokens)[:, :-1].reshape(-1, 270), tokens[:, 1:].reshape(-1))
    assert rows_logged[22]["test/loss"] == pytest.approx(float(test), rel=1e-4)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("stops", [[1], [7], [10, 3]])
def test_an_interrupted_run_ends_in_the_same_bytes(config, tmp_path, stops):
    run(config, tmp_path / "whole")
    for stop in stops:
        assert not run(config, tmp_path / "parts", stop).finished
    assert run(config, tmp_path / "parts").finished
    assert files(tmp_path / "parts", config) == files(tmp_path / "whole", config)


def test_seeds_that_train_together_are_solo_runs(config, tmp_path):
    task = config.task_config.model_dump(mode="json") | {"sampling_seed": None}
    data = config.model_dump(mode="json") | {"run_name": None}
    configs = [parse_training({**data, "task_config": {**task, "model_seed": seed}}).resolved() for seed in (0, 1)]
    assert configs[0].name != configs[1].name
    members = [
        Member(
            each,
            Checkpoints(LocalStore(tmp_path / "both"), each.name),
            LocalTracker(tmp_path / "both" / "icl" / each.name, 0),
        )
        for each in configs
    ]
    train_members(members)
    for each in configs:
        run(each, tmp_path / "alone")
        assert files(tmp_path / "both", each) == files(tmp_path / "alone", each)


def test_another_text_is_another_run(config, tmp_path):
    run(config, tmp_path / "run", 3)
    tokens = config.task_config.tokens.model_copy(update={"begin": "<s>"})
    other = config.model_copy(
        update={"task_config": config.task_config.model_copy(update={"tokens": tokens}), "run_name": config.name}
    )
    with pytest.raises(CheckpointError, match=r"task_config\.tokens\.begin"):
        run(other, tmp_path / "run")


def test_other_bytes_under_the_same_name_are_refused_where_their_sum_is_given(config, tmp_path):
    rows = token_rows(config.task_config.tokens, 13, 270)
    tokens = config.task_config.tokens.model_copy(update={"sha256": rows.sha256()})
    pinned = config.model_copy(update={"task_config": config.task_config.model_copy(update={"tokens": tokens})})
    run(pinned, tmp_path / "run", 3)
    (tmp_path / "text.txt").write_text(TEXT.replace("word", "deed"))
    with pytest.raises(ConfigError, match="another text, version of the package or tokenizer"):
        run(pinned, tmp_path / "run")


def test_tokens_that_are_refused_begin_no_run(config, tmp_path):
    place = Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")
    for change, message in (
        ({"n_ctx": 10_000}, "one row needs 9999"),
        ({"held_out": 10_000}, "leaves none to train on"),
        ({"d_vocab": 100}, "d_vocab=100"),
        (
            {"tokens": config.task_config.tokens.model_copy(update={"text": ("nothing.txt",)})},
            "no file fits nothing.txt",
        ),
    ):
        refused = config.model_copy(update={"task_config": config.task_config.model_copy(update=change)})
        with pytest.raises(ConfigError, match=message):
            run_training(refused, place)
        assert list_runs(place.store) == []
        assert read_metrics(place.results / refused.name) == []
    assert run_training(config, place).finished
    (tmp_path / "text.txt").unlink()
    assert run_training(config, place).finished, "a run that is done needs no tokens"
    model = open_run(tmp_path / "icl" / config.name).model(22)
    assert isinstance(model, AttentionOnlyTransformer)
    assert model.shape == language_shape(config.task_config)


def test_the_kind_is_told_by_the_task(config):
    assert isinstance(parse_training({"task_config": {"task_type": "linear"}}), TrainingConfig)
    assert isinstance(parse_training({}), TrainingConfig)
    assert type(parse_training(config.model_dump(mode="json"))) is LanguageTraining
    assert config.name.startswith("language-L2W11V270-seed0-")
    with pytest.raises(ConfigError, match=r"unknown key 'task_config\.d_modell'.*d_model"):
        parse_training({"task_config": {"task_type": "language", "d_modell": 3}})


def test_published_defaults():
    config = LanguageTraining()
    assert vars(language_shape(config.task_config)) == vars(AttentionOnlyTransformer(seed=0).shape)
    optimizer = config.optimizer_config
    assert (optimizer.optimizer_type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-3, 0.05)
    assert (config.num_steps, config.batch_size, config.learning_rate(40_000)) == (50_000, 100, 1e-3)
