import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from icl.config import ConfigError, TrainingConfig
from icl.config.sweeps import expand, load_sweep, override, parse_override, plain_config, select

GRID = """
name: quick
method: grid
command: ["${env}", "icl", "train"]
project: icl
parameters:
  task_config:
    parameters:
      task_size: {value: 4}
      model_seed: {values: [0, 1, 2]}
      num_tasks: {value: 'inf'}
      pretrain_seed: {value: null}
  checkpointer_config:
    parameters:
      checkpoint_steps:
        parameters:
          log_space: {value: 100}
          linear_space: {value: 10_000}
  optimizer_config:
    parameters:
      lr: {values: [0.003, 1e-4]}
  eval_batch_size: {value: 1024}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_grid_is_the_cartesian_product_with_every_constant(tmp_path):
    configs = expand(load_sweep(write(tmp_path, GRID)))
    assert {(c["optimizer_config"]["lr"], c["task_config"]["model_seed"]) for c in configs} == set(
        itertools.product([3e-3, 1e-4], [0, 1, 2])
    )
    assert len(configs) == 6
    for config in configs:
        assert config["checkpointer_config"] == {"checkpoint_steps": {"log_space": 100, "linear_space": 10_000}}
        assert config["task_config"]["num_tasks"] == "inf"
        assert config["task_config"]["pretrain_seed"] is None


def test_file_facts_are_kept(tmp_path):
    sweep = load_sweep(write(tmp_path, GRID))
    assert (sweep.name, sweep.project, sweep.entity, sweep.method) == ("quick", "icl", None, "grid")
    assert sweep.command == ("${env}", "icl", "train")


def test_offline_configs_equal_those_of_the_hosted_engine_one_at_a_time(tmp_path):
    from icl.config.sweeps import engine

    sweep = load_sweep(write(tmp_path, GRID))
    runs, hosted = [], []
    while (run := engine().next_run({"method": "grid", "parameters": sweep.parameters}, runs)) is not None:
        runs.append(run)
        hosted.append(plain_config(run.config))
    assert hosted == expand(sweep)


def test_values_that_are_lists_stay_lists(tmp_path):
    text = "method: grid\nparameters: {include: {values: [['*'], ['a.*', 'b.**']]}, eval_metrics: {value: [x, y]}}"
    assert [c["include"] for c in expand(load_sweep(write(tmp_path, text)))] == [["*"], ["a.*", "b.**"]]


RANDOM = """
method: random
run_cap: 7
parameters: {lr: {distribution: log_uniform_values, min: 0.001, max: 1.0}, n: {min: 2, max: 5}}
"""


def test_random_draws_depend_on_the_seed_alone(tmp_path):
    import random

    sweep = load_sweep(write(tmp_path, RANDOM))
    state = random.getstate()
    first, other = expand(sweep), expand(sweep, seed=1)
    assert random.getstate() == state
    assert first == expand(sweep)
    assert first != other
    assert len(first) == 7
    assert expand(sweep, count=3) == first[:3]
    for config in first:
        assert 1e-3 <= config["lr"] <= 1.0
        assert type(config["lr"]) is float
        assert 2 <= config["n"] <= 5
        assert type(config["n"]) is int


def test_random_without_an_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="run_cap"):
        expand(load_sweep(write(tmp_path, RANDOM.replace("run_cap: 7\n", ""))))


def test_overrides_merge_runs_that_become_equal(tmp_path):
    configs = expand(
        load_sweep(write(tmp_path, GRID)),
        ["task_config.model_seed=5", "num_steps=1e3", "checkpointer_config.checkpoint_steps={log_space: 3}"],
    )
    assert [c["optimizer_config"]["lr"] for c in configs] == [3e-3, 1e-4]
    assert all(c["task_config"]["model_seed"] == 5 and c["num_steps"] == 1000 for c in configs)
    assert configs[0]["checkpointer_config"]["checkpoint_steps"] == {"log_space": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1", 1),
        ("a.b=null", None),
        ("a.b=", None),
        ("a.b=[1, x]", [1, "x"]),
        ("a.b=1e-4", 1e-4),
        ("a.b=10_000", 10_000),
        ("a.b=inf", "inf"),
        ("a.b=c=d", "c=d"),
        ("a.b=true", True),
    ],
)
def test_override_values_are_yaml(text, value):
    assert parse_override(text) == (("a", "b"), value)


@pytest.mark.parametrize("text", ["a.b", "=3", "a..b=3", "a.b=[1"])
def test_malformed_overrides_say_so_in_one_line(text):
    with pytest.raises(ConfigError) as error:
        parse_override(text)
    assert "\n" not in str(error.value)
    assert text in str(error.value)


def test_override_leaves_its_input_alone_and_refuses_to_descend_into_a_value():
    config = {"a": {"b": 1}}
    assert override(config, ("a", "c"), 2) == {"a": {"b": 1, "c": 2}}
    assert config == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match="'b' is 1"):
        override(config, ("a", "b", "c"), 2)


def test_select():
    configs = [{"a": 1}, {"a": 2}]
    assert select(configs, 1) == {"a": 2}
    for index in (-1, 2):
        with pytest.raises(ConfigError, match="2 runs, numbered from 0 to 1"):
            select(configs, index)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "method: grid\nparameters:\n  a: {value: 1}\n  a: {value: 2}\n",
            r"sweep\.yaml, line 4: the key 'a' is given twice",
        ),
        ("method: grid\nparameters:\n  a: [1\n", r"sweep\.yaml, line \d+: "),
        ("method: grid\nparameters:\n\ta: 1\n", r"sweep\.yaml, line 3: "),
        ("method: grid\nparameters: {a: {vlaue: 1}}", "parameters.a: unknown key 'vlaue': did you mean 'value'"),
        ("method: grid\nparameters: {a: {parameters: {b: 3}}}", "parameters.a.parameters.b: write 'value: 3'"),
        ("method: grid\nparameters: {a: {values: []}}", "parameters.a.values must be a list"),
        ("method: grid\nparameters: {a: {min: 0.0, max: 1.0}}", "disallowed type with grid"),
        ("method: bayes\nparameters: {a: {value: 1}}", "method 'bayes' is not one that runs offline"),
        ("method: grid\nparamters: {a: {value: 1}}", "'method' and 'parameters'"),
        ("method: grid\nprogam: x\nparameters: {a: {value: 1}}", "unknown key 'progam': did you mean 'program'"),
        ("method: grid\nrun_cap: true\nparameters: {a: {value: 1}}", "run_cap must be"),
        ("method: grid\nproject: 7\nparameters: {a: {value: 1}}", "project must be text"),
        ("method: grid\nparameters: {1: {value: 1}}", r"parameters\.1: the name of a parameter must be text"),
        ("method: grid\nparameters: {a: {}}", r"parameters\.a is empty"),
        ("method: grid\nparameters: {a: {value: 1, values: [2]}}", r"parameters\.a has both value and values"),
        (
            "method: grid\nparameters: {a: {parameters: {b: {min: true, max: 3}}}}",
            r"a\.parameters\.b\.min must be a number",
        ),
        ("method: grid\nparameters: {a: {min: 1, max: x}}", r"parameters\.a\.max must be a number \(got 'x'"),
        ("method: grid\nparameters: {a: {min: 0, max: .inf}}", r"parameters\.a\.max must be a number"),
        (f"method: grid\nparameters: {{a: {{min: 1, max: 1{'0' * 400}}}}}", r"parameters\.a\.max must be a number"),
        ("method: grid\nparameters: {a: {values: [1, 2], probabilities: [1]}}", r"parameters\.a\.probabilities"),
        ("method: grid\nparameters: {a.b: {value: 1}}", r"nests its keys; write a: \{parameters: \{b: \.\.\.\}\}"),
        (
            "method: random\nrun_cap: 2\nparameters: {a: {distribution: foo, min: 1, max: 3}}",
            "a; check its distribution",
        ),
        ("method: grid\nrun_cap: 0\nparameters: {a: {value: 1}}", "run_cap must be"),
        ("- a\n- b\n", "a sweep file is a mapping"),
        ("", "a sweep file is a mapping"),
    ],
)
def test_every_fault_of_a_file_is_one_readable_line(tmp_path, text, expected):
    with pytest.raises(ConfigError) as error:
        expand(load_sweep(write(tmp_path, text)))
    assert re.search(expected, str(error.value))
    assert "sweep.yaml" in str(error.value)
    assert "\n" not in str(error.value)


MERGED = """
method: grid
parameters:
  a: &whole {value: 8}
  b: {<<: *whole}
  c: &more {<<: *whole, value: 3}
  d: {<<: [*more, *whole]}
  e: {<<: *more}
"""


def test_merge_keys_mean_what_yaml_says(tmp_path):
    assert expand(load_sweep(write(tmp_path, MERGED))) == [{"a": 8, "b": 8, "c": 3, "d": 3, "e": 3}]


SCIENTIFIC = """
method: random
run_cap: 1e1
parameters:
  lr: {distribution: log_uniform_values, min: 1e-5, max: 1E-2}
  real: {min: 1e0, max: 2.5}
  one_end: {min: 2, max: 1e3}
  both_ends: {distribution: int_uniform, min: 1e0, max: 1e3}
  choice: {values: [1e3, 2e3], probabilities: [1e-1, 9e-1]}
"""


def test_numbers_may_be_written_like_1e3_wherever_a_number_stands(tmp_path):
    configs = expand(load_sweep(write(tmp_path, SCIENTIFIC)))
    assert len(configs) == 10
    for config in configs:
        assert 1e-5 <= config["lr"] <= 1e-2
        assert [type(config[name]) for name in ("real", "one_end", "both_ends")] == [float, int, int]
        assert config["choice"] in (1000, 2000)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("num_steps: {value: 1e3}", {"num_steps": 1000}),
        ("batch_size: {value: 1.6e1}", {"batch_size": 16}),
        ("checkpointer_config: {value: {checkpoint_steps: [1e1, 2e1]}}", {"checkpoint_steps": [10, 20]}),
        (
            "checkpointer_config: {value: {checkpoint_steps: {log_space: 1e2}}}",
            {"checkpoint_steps": {"log_space": 100}},
        ),
        ("checkpointer_config: {value: {checkpoint_steps: {linear_space: [0, 1e2, 1e1]}}}", {}),
        ("run_name: {value: 2024-01-31}", {"run_name": "2024-01-31"}),
    ],
)
def test_whole_numbers_written_like_1e3_are_integers(tmp_path, setting, expected):
    (data,) = expand(load_sweep(write(tmp_path, f"method: grid\nparameters:\n  {setting}\n")))
    config = TrainingConfig.parse(data).model_dump(mode="json")
    assert (config | config["checkpointer_config"]) | expected == config | config["checkpointer_config"]


def laughs(levels):
    """Lists of ten aliases to lists of ten aliases."""
    lines = [f"  k{i}: {{value: &a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 10)}]}}\n" for i in range(levels)]
    return "method: grid\nparameters:\n" + "".join(lines)


THOUSAND = f"{{values: [{','.join(map(str, range(1000)))}]}}"
GRID_OF = "method: grid\nparameters:\n  "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (laughs(30), r"line 8: .*aliases.*more than 1,000,000 entries"),
        (f"{GRID_OF}a: {{value: {'[' * 5000}{']' * 5000}}}", "line 3: nested more than 50 deep"),
        (
            "method: grid\nparameters: &a\n  x: {parameters: *a}\n",
            "line 3: an alias refers to a value that contains it",
        ),
        (f"{GRID_OF}a: {{value: &q [*q]}}", "line 3: an alias refers to a value that contains it"),
        (
            GRID_OF + "\n  ".join(f"a{i}: {{value: &a{i} [{f'*a{i - 1}' if i else 'x'}]}}" for i in range(999)),
            "line 51: .*more than 50 levels",
        ),
        (f"{GRID_OF}a: {THOUSAND}\n  b: {THOUSAND}\n  c: {THOUSAND}", "this sweep has 1,000,000,000 runs"),
        (f"{GRID_OF}a: {{min: 1, max: 1e9}}", "this sweep has 1,000,000,000 runs"),
        (
            f"{GRID_OF}a: {{parameters: {{b: {{distribution: q_uniform, min: 0, max: 1, q: 1e-9}}}}}}",
            "1,000,000,001 runs",
        ),
        ("method: random\nrun_cap: 1e9\nparameters: {a: {min: 1, max: 3}}", "1,000,000,000 runs, .* lower its run_cap"),
        (f"{GRID_OF}a: {THOUSAND}\n  b: {{value: [{'1,' * 20000}]}}", "its 1,000 runs have 20,004,000 entries in all"),
    ],
)
def test_the_size_of_a_sweep_is_known_before_it_is_expanded(tmp_path, text, expected):
    with pytest.raises(ConfigError) as error:
        expand(load_sweep(write(tmp_path, text)))
    assert re.search(expected, str(error.value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_file_larger_than_any_sweep_is_not_read(tmp_path):
    path = write(tmp_path, GRID)
    with path.open("r+b") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ConfigError, match=r"sweep\.yaml: it is larger than"):
        load_sweep(path)


@pytest.mark.parametrize(
    "value",
    [
        "2020-13-45",
        "2020-02-30",
        "!!int x",
        "!!float ''",
        "!!bool 3",
        "!!timestamp x",
        "!!binary é",
        "!!omap [a]",
        "!foo 3",
    ],
)
def test_what_yamls_constructors_raise_is_one_line_with_its_place(tmp_path, value):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"{GRID_OF}a: {{value: {value}}}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sweep\.yaml, line 3: ") as error:
        load_sweep(path)
    assert "\n" not in str(error.value)


def test_the_line_of_a_character_that_is_not_allowed_is_named(tmp_path):
    for text in (b"a: 1\nb: \x00", b"a: 1\nb: \xf6"):
        (tmp_path / "sweep.yaml").write_bytes(text)
        with pytest.raises(ConfigError, match=r"sweep\.yaml, line 2: "):
            load_sweep(tmp_path / "sweep.yaml")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_sweep(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_sweep(tmp_path / "binary.yaml")


def test_yaml_tags_run_no_code(tmp_path):
    with pytest.raises(ConfigError, match="line 2"):
        load_sweep(write(tmp_path, "method: grid\nparameters: !!python/object/apply:os.getcwd []\n"))


def test_importing_the_module_imports_neither_engine_nor_wandb():
    code = (
        "import sys, icl.config.sweeps; print([m for m in ('sweeps', 'wandb', 'pandas', 'scipy') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("!!set {a, b}", "!!set"),
        ("!!binary aGVsbG8=", "!!binary"),
        ("!!omap [a: 1]", "!!omap"),
        ("!!python/object/apply:os.system ['true']", "python"),
        ("!mine 3", "!mine"),
        ("=", "quotes"),
        ('"\\UFFFFFFFF"', "an escape sequence is not a valid character"),
        ('"\\U00110000"', "an escape sequence is not a valid character"),
        ("9" * 5000, "not a valid int"),
        ("2024-13-45", "timestamp"),
        ("{1: a, 1.0: b}", "given twice"),
        ("{1: a, '1': b}", "given twice"),
        ("{yes: a, on: b}", "given twice"),
        ("{0x1: a, 1: b}", "given twice"),
        ("{[1]: a}", "a key is a word"),
        ("3\n---\nmethod: grid", "second document"),
        ("\t3", "indent with spaces"),
    ],
)
def test_what_no_configuration_could_hold_is_one_line_with_file_and_line(tmp_path, value, said):
    path = write(tmp_path, f"method: grid\nparameters:\n  a:\n    value: {value}\n")
    with pytest.raises(ConfigError) as caught:
        expand(load_sweep(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line ")
    assert said in message
    assert len(message) < 300
    assert "\n" not in message


def test_a_file_of_thousands_of_parameters_is_refused_before_it_is_expanded(tmp_path):
    names = ", ".join(f"a{number}: {{value: 1}}" for number in range(1001))
    with pytest.raises(ConfigError, match=r"1,003 parameters"):
        expand(
            load_sweep(
                write(tmp_path, f"method: grid\nparameters: {{b: {{parameters: {{c: {{value: 1}}}}}}, {names}}}")
            )
        )


def test_an_override_of_several_lines_is_refused_in_one():
    with pytest.raises(ConfigError) as caught:
        parse_override("num_steps=20\n---\n3")
    assert str(caught.value) == "--set num_steps=20 --- 3, line 2: a second document begins here; keep one in a file"
