"""`icl config` prints what there is to set, and all of it can be set as printed."""

import re
import sys
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from icl.analysis.data import DataSettings
from icl.cli import main
from icl.commands.config import COMMANDS, config_command, settings_of
from icl.config import ConfigError, Settings
from icl.config.sweeps import override, parse_override
from icl.estimation import LLCConfig
from icl.sampling.kernels import KERNELS
from icl.sampling.presets import PRESETS
from icl.subjects.named import SHIPPED
from icl.tasks import TASKS


def all_configurations(kind: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("icl."):
            yield each
        yield from all_configurations(each)


def printed(command, words, **console) -> list[str]:
    text = StringIO()
    config_command(command, words, Console(file=text, **console))
    return text.getvalue().splitlines()


def test_every_field_of_every_configuration_says_in_words_what_it_is():
    fields = {
        f"{kind.__name__}.{name}": field.description or ""
        for kind in all_configurations()
        for name, field in kind.model_fields.items()
    }
    assert len(fields) > 70
    assert f"{DataSettings.__name__}.noise_std" in fields
    assert [name for name, description in fields.items() if len(description.split()) < 2] == []
    assert [name for name, description in fields.items() if description.endswith(".")] == []


@pytest.mark.parametrize(("key", "names"), [
    ("sampler_config.sampling_method", ["auto", *KERNELS]), ("task_config.task_type", TASKS), ("preset", PRESETS), ("subject", SHIPPED),
])  # fmt: skip
def test_a_setting_that_takes_a_name_says_which_names_there_are(key, names):
    (meaning,) = [each.meaning for each in settings_of(LLCConfig) if each.key == key]
    assert [name for name in names if not re.search(rf"\b{name}\b", meaning)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_is_what_set_takes_and_sets_the_default(command):
    kind = COMMANDS[command]
    settings = list(settings_of(kind))
    assert len({setting.key for setting in settings}) == len(settings) > 30
    for setting in settings:
        path, value = parse_override(f"{setting.key}={setting.default}")
        assert kind.parse(override({}, path, value)) == kind(), setting.key
        with pytest.raises(ConfigError, match=path[-1]):
            kind.parse(override({}, path, {"no": "such value"}))


def test_a_line_holds_a_setting_where_a_program_reads():
    lines = printed(None, [])
    assert sorted(line.split("=")[0] for line in lines) == sorted(
        setting.key for setting in settings_of(COMMANDS["llc"])
    )
    assert "optimizer_config.lr=0.001  largest learning rate of the schedule (float > 0)" in lines
    assert any(line.endswith("(only SGD) (float >= 0, < 1 | null)") for line in lines)


def test_on_a_terminal_no_line_is_wider_than_it():
    lines = printed(None, [], width=70, force_terminal=True, no_color=True)
    assert max(Text.from_ansi(line.rstrip()).cell_len for line in lines) <= 70
    assert any(line.startswith("    ") for line in lines)


def test_words_choose_and_a_wrong_one_is_an_error(monkeypatch, capsys):
    assert [line.split("=")[0] for line in printed("train", ["_seed", "lr"])] == [
        *(f"task_config.{name}_seed" for name in ("model", "pretrain", "true", "sampling")),
        "optimizer_config.lr",
        "scheduler_config.max_lr",
    ]
    with pytest.raises(ConfigError, match=r"no setting has sampler_config in its key"):
        config_command("train", ["sampler_config"])
    monkeypatch.setattr(sys, "argv", ["icl", "config", "seed"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "icl config seed: give a command first, train or llc or language" in capsys.readouterr().err
