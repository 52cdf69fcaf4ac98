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
from icl.storage import InvalidKeyError, LocalStore, check_key

FAST, SLOW = 150, 4000


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
