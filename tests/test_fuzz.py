"""Hostile and random input of every kind: only the documented errors come out, each in one line."""

import json
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.format import decode, encode
from icl.config import ConfigError, TrainingConfig
from icl.config.sweeps import MAX_RUNS, expand, load_sweep
from icl.estimation.traces import read_estimates, read_traces
from icl.storage import InvalidKeyError, LocalStore, check_key
from icl.storage.jsonl import JsonLines, has_step
from icl.tracking import LocalTracker, read_metrics, read_summary
from icl.training import first_missing_step
from icl.training.standing import starting_point

FAST, SLOW = 150, 4000

# A thread that an earlier test left (a retry's random pause) may draw from it while inputs are made.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


def fuzz(strategy, slow=SLOW):
    """A property over random inputs: a few in the fast suite, thousands behind the marker `slow`."""

    def mark(test):
        quiet = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

        @pytest.mark.parametrize("count", [FAST, pytest.param(slow, marks=pytest.mark.slow)])
        def run(count, tmp_path_factory):
            folder, seen = tmp_path_factory.mktemp("fuzz"), 0

            def look(value):
                nonlocal seen
                seen += 1
                test(folder, value)

            settings(max_examples=count, **quiet)(given(strategy)(look))()
            print(f"{seen} inputs: {test.__name__}")
            assert seen >= count

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        return run

    return mark


def one_line(error, *named):
    assert "\n" not in str(error)
    assert 0 < len(str(error)) < 1000
    for text in named:
        assert text in str(error)


WHOLE = encode(3, {"a": torch.arange(15.0).view(5, 3), "b": torch.tensor(7)}, {"config": "{}"}, "weights")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated_checkpoints(draw):
    """A good file with pieces overwritten, cut out or put in."""
    data = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 12)))
        data[start:stop] = draw(st.binary(max_size=12))
    return bytes(data)


@st.composite
def forged_checkpoints(draw):
    """A valid safetensors file whose record is nearly ours."""
    record = {"format": 1, "kind": "weights", "step": 3, "sha256": "0" * 64, "metadata": {}}
    for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=3)):
        if draw(st.booleans()):
            record.pop(name, None)
        else:
            record[name] = draw(json_values)
    entry = draw(st.just(json.dumps(record)) | st.text(max_size=20) | json_values.map(json.dumps))
    return save({"w": torch.zeros(3)}, {draw(st.sampled_from(["icl", "other"])): entry})


@st.composite
def headers(draw):
    """Any JSON, or nearly JSON, where the header of a safetensors file stands."""
    text = draw(json_values.map(json.dumps) | st.text(max_size=40)).encode("utf-8", "surrogatepass")
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return length.to_bytes(8, "little") + text + draw(st.binary(max_size=20))


@fuzz(st.binary(max_size=300) | mutated_checkpoints() | forged_checkpoints() | headers())
def test_no_bytes_pass_for_a_checkpoint_unless_they_are_one(folder, data):
    try:
        checkpoint = decode(data, "file", "weights")
    except CheckpointError as error:
        one_line(error)
    else:
        # What is accepted holds the very contents that were written, up to spaces in the header.
        assert encode(checkpoint.step, checkpoint.tensors, checkpoint.metadata, "weights") == WHOLE


odd_text = st.text(max_size=30) | st.text(alphabet="./\\~ab-_\0\n$", max_size=12) | st.from_regex(r"[a-z0-9./_-]{1,30}")


@fuzz(odd_text)
def test_no_key_names_a_file_outside_its_store(folder, key):
    store = LocalStore(folder / "root")
    try:
        check_key(key)
    except InvalidKeyError as error:
        one_line(error)
        with pytest.raises(InvalidKeyError):
            store.put(key, b"x")
    else:
        path = (store.root / key).resolve()
        assert path.is_relative_to(store.root.resolve())
        assert path != store.root.resolve()
    try:
        assert "/" not in Checkpoints(store, key).prefix.removeprefix("icl/")
    except CheckpointError as error:
        one_line(error)
    assert not (folder / "root").exists()


KEYS = sorted(
    {
        *TrainingConfig.model_fields,
        "task_config",
        "lr",
        "num_tasks",
        "num_heads",
        "embed_size",
        "steps",
        "log_space",
        "x",
    }
)
config_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["inf", "Adam", "64"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)


@fuzz(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), config_values, max_size=5))
def test_any_configuration_is_accepted_or_refused_in_one_line(folder, data):
    try:
        config = TrainingConfig.parse(data)
    except ConfigError as error:
        one_line(error)
        return
    assert TrainingConfig.parse(config.model_dump(mode="json")) == config
    try:
        Checkpoints(LocalStore(folder / "root"), config.name)
    except CheckpointError as error:  # a run name that is none
        assert config.run_name is not None
        one_line(error)


yaml_text = (
    st.text(max_size=80)
    | st.text(alphabet=string.ascii_letters + ":{}[]-&*!|>'\"#%@, \n\t0123456789", max_size=120)
    | st.dictionaries(
        st.sampled_from(["program", "method", "parameters", "name", "project", "x"]), config_values, max_size=4
    ).map(lambda tree: json.dumps(tree))
    | st.sampled_from(
        ["!!python/object/apply:os.system ['touch exploded']", "a: &a [*a]", "&a {b: *a}", "- !!binary x", "1: 2\n1: 3"]
    )
)


@fuzz(yaml_text)
def test_any_sweep_file_is_expanded_or_refused_in_one_line(folder, text):
    path = folder / "sweep.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        expand(load_sweep(path))
    except ConfigError as error:
        one_line(error)
    assert {file.name for file in folder.iterdir()} == {"sweep.yaml"}


SCALARS = [
    *(
        "1",
        "0",
        "-1",
        "7",
        "1e3",
        "1e-5",
        "-2.5E+1",
        "1e999",
        ".inf",
        ".nan",
        "1.5",
        "0x1F",
        "1_000",
        "190:20:30",
        "9" * 400,
    ),
    *(
        "yes",
        "no",
        "on",
        "true",
        "False",
        "null",
        "~",
        "",
        "inf",
        "Adam",
        "x",
        "'1e3'",
        '"\\ud800"',
        "é",
        "<<",
        "=",
        "?",
    ),
    *(
        "2020-02-30",
        "2020-02-20",
        "2020-13-45T99:00:00Z",
        "!!int x",
        "!!float ''",
        "!!bool z",
        "!!binary é",
        "!!timestamp t",
    ),
    *(
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!omap [a]",
        "!!pairs 3",
        "!!null x",
        "!!python/name:os.system x",
        "!own 1",
        "!!str [1]",
    ),
    *("*a", "*b", "*c", "&a 1", "&b [*a, *a]", "&c {value: *b}", "&a {<<: *b}", "[*b, *b]", "&a [*a]"),
]


def flow_mapping(pairs):
    return "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"


flow_values = st.recursive(
    st.sampled_from(SCALARS) | st.integers().map(str) | st.floats().map(str),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda parts: f"[{', '.join(parts)}]")
        | st.lists(st.tuples(st.sampled_from([*KEYS, "<<", "1", "[a]"]), inner), max_size=3).map(flow_mapping)
    ),
    max_leaves=6,
)
ENTRY_KEYS = [
    "value",
    "values",
    "parameters",
    "min",
    "max",
    "q",
    "mu",
    "sigma",
    "a",
    "distribution",
    "probabilities",
    "<<",
]
DISTRIBUTIONS = [
    "uniform",
    "int_uniform",
    "log_uniform_values",
    "q_uniform",
    "normal",
    "q_log_normal",
    "beta",
    "constant",
    "[x]",
]


ranges = st.tuples(st.sampled_from(DISTRIBUTIONS), st.sampled_from(SCALARS[:15]), st.sampled_from(SCALARS[:15])).map(
    lambda three: flow_mapping(zip(("distribution", "min", "max"), three, strict=True))
)
leaves = (
    flow_values.map(lambda value: f"{{value: {value}}}")
    | st.lists(flow_values, max_size=40).map(lambda parts: f"{{values: [{', '.join(parts)}]}}")
    | ranges
    | st.lists(st.tuples(st.sampled_from(ENTRY_KEYS), flow_values), max_size=4).map(flow_mapping)
    | flow_values
)
names = st.sampled_from(
    [*KEYS, "optimizer_config", "optimizer_config.lr", "sampler_config", "1", "yes", "<<", "? [a]\n  "]
)
entries = leaves | st.lists(st.tuples(names, leaves), max_size=4).map(
    lambda pairs: f"{{parameters: {flow_mapping(pairs)}}}"
)
anchors = st.sampled_from(["", "", "&a ", "&b ", "&c "])


@st.composite
def sweep_files(draw):
    """Nearly sweep files: right in most places, with everything that YAML and W&B allow and a good deal that they do not."""
    head = [f"method: {draw(st.sampled_from(['grid', 'random', 'bayes', 'yes']))}"]
    if draw(st.booleans()):
        head.append(f"run_cap: {draw(st.sampled_from([*SCALARS, '3', '1e1', '1e9']))}")
    if draw(st.integers(0, 9)) == 0:
        head.append(f"{draw(st.sampled_from(['name', 'project', 'command', 'method', 'x']))}: {draw(flow_values)}")
    pairs = draw(st.lists(st.tuples(names, anchors, entries), min_size=1, max_size=6))
    body = [f"  {name}: {anchor}{entry}" for name, anchor, entry in pairs]
    return "\n".join([*head, "parameters:", *body])


@fuzz(sweep_files(), slow=20_000)
def test_nearly_any_sweep_file_gives_configurations_or_one_line_with_its_name(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        configs = expand(load_sweep(path))
    except ConfigError as error:
        one_line(error, "sweep.yaml")
        return
    assert 1 <= len(configs) <= MAX_RUNS
    for data in configs[:3]:
        try:
            config = TrainingConfig.parse(data)
        except ConfigError as error:
            one_line(error)
        else:
            assert TrainingConfig.parse(config.model_dump(mode="json")) == config


ROWS = [{"step": step, "x": [1.5, None, "λ\n"]} for step in range(6)]
LINES = [json.dumps(row).encode() for row in ROWS]


@st.composite
def spoilt_records(draw):
    """A record with lines overwritten, inserted or cut, and which of its rows nothing touched."""
    lines = [(line, step) for step, line in enumerate(LINES)]
    junk = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")) | json_values.map(
        lambda value: json.dumps(value).encode("utf-8", "surrogatepass")
    )
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines)))
        lines[place : place + draw(st.integers(0, 1))] = [(draw(junk), None)]
    tail = draw(st.binary(max_size=20))
    return b"".join(line + b"\n" for line, _ in lines) + tail, [step for _, step in lines if step is not None]


@fuzz(spoilt_records())
def test_no_line_of_a_record_costs_another(folder, record):
    data, untouched = record
    for name in ("metrics.jsonl", "traces.jsonl", "metrics.jsonl.damaged"):
        (folder / name).unlink(missing_ok=True)
    for name in ("metrics.jsonl", "traces.jsonl", "summary.json"):
        (folder / name).write_bytes(data)
    rows = read_metrics(folder)
    kept = iter(rows)
    assert all(ROWS[step] in kept for step in untouched)  # in their order
    assert all(has_step(row) for row in rows)
    read_traces(folder)
    read_estimates(folder)
    assert isinstance(read_summary(folder), dict)
    tracker = LocalTracker(folder, 6)
    tracker.log(6, {"x": 0.5})
    again = read_metrics(folder)
    assert again == [*(row for row in rows if row["step"] < 6), {"step": 6, "x": 0.5}]
    assert tracker.rows == len(again)
    before = (folder / "metrics.jsonl").read_bytes()
    JsonLines(folder / "metrics.jsonl")
    assert (folder / "metrics.jsonl").read_bytes() == before


SMALL = TrainingConfig.parse(
    {
        "task_config": {"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1},
        "num_steps": 9, "checkpointer_config": {"checkpoint_steps": [8]}, "run_name": "run",
    }
).resolved()  # fmt: skip
P = SMALL.task_config.shape.num_parameters
STATE = {"flat": torch.zeros(P), "exp_avg": torch.ones(P), "exp_avg_sq": torch.ones(P), "step": torch.tensor(5.0)}

shapes = st.sampled_from([(), (0,), (1,), (5,), (P,), (P - 1,), (P + 1,), (1, P), (P, 1), (2, P // 2)])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])


@st.composite
def forged_states(draw):
    """A whole file of a state whose names, shapes, dtypes, count or settings are nearly right."""
    tensors, metadata = dict(STATE), {"config": SMALL.model_dump_json(), "rows": 0}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*STATE, "exp_avg ", "momentum_buffer", "", "Flat"]))
        if draw(st.booleans()):
            tensors.pop(name, None)
        else:
            tensors[name] = torch.full(draw(shapes), 5).to(draw(dtypes))
    if draw(st.booleans()):
        metadata["rows"] = draw(json_values)
    if draw(st.integers(0, 3)) == 0:
        metadata["config"] = draw(json_values | json_values.map(json.dumps))
    return tensors, metadata


@fuzz(forged_states())
def test_no_state_reaches_the_optimiser_unless_it_is_one_of_this_run(folder, state):
    tensors, metadata = state
    run = Checkpoints(LocalStore(folder), "run")
    try:
        data = encode(5, tensors, metadata, "state")
    except CheckpointError:
        return  # of metadata that are no JSON
    run.store.put(run.state_key(5), data)
    try:
        step, taken = starting_point(SMALL, run)
    except CheckpointError as error:
        one_line(error)
        return
    assert step in (0, 5)
    if step == 5:
        assert {name: (value.shape, value.dtype) for name, value in taken.items()} == {
            name: (value.shape, value.dtype) for name, value in STATE.items()
        }
        assert taken["step"] == 5
        assert metadata["config"] == SMALL.model_dump_json()


@st.composite
def other_settings(draw):
    """The settings of a run, some of them changed, in the form in which they are stored."""
    stored = SMALL.model_dump(mode="json")
    for _ in range(draw(st.integers(0, 2))):
        part = draw(st.sampled_from([stored, *(value for value in stored.values() if isinstance(value, dict))]))
        name = draw(st.sampled_from([*part, "new"]) if part else st.just("new"))
        part[name] = draw(json_values | st.sampled_from([1, 2, 3, 0.5, "Adam", "single", True, "inf"]))
    return draw(st.just(stored) | json_values) if draw(st.integers(0, 9)) == 0 else stored


@fuzz(other_settings())
def test_stored_settings_are_those_of_the_run_or_refused_in_one_line(folder, stored):
    run = Checkpoints(LocalStore(folder), "run")
    run.store.put("icl/run/config.json", json.dumps(stored).encode())
    try:
        first_missing_step(SMALL, run)
    except CheckpointError as error:
        one_line(error)
    else:
        kept = {name: stored[name] for name in SMALL.decides if name in stored} if isinstance(stored, dict) else {}
        if kept:  # a file without settings is damaged, and written anew
            assert TrainingConfig.parse(kept).identity() == SMALL.identity()
