"""Every number of every command's arguments: NaN, infinity and what is below zero are refused in one line."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from nsa.training.config import LIMITS, TrainConfig
from nsa.training.generation import GenerateConfig, generate
from nsa.training.info import InfoConfig, info
from nsa.training.limits import ANY
from nsa.training.presets import PRESETS

COMMANDS = {
    "train": (TrainConfig(), TrainConfig.validate),
    "generate": (GenerateConfig(model=Path("/nowhere"), prompt=""), generate),
    "info": (InfoConfig(model="demo", bandwidth=1.0), info),
}
NUMBERS = [
    (command, field.name, type(getattr(config, field.name)))
    for command, (config, _) in COMMANDS.items()
    for field in fields(config)
    if type(getattr(config, field.name)) in (int, float)
]


@pytest.mark.parametrize(("command", "name", "kind"), NUMBERS)
def test_a_number_that_no_run_can_have_is_one_line_that_names_it(command, name, kind):
    config, use = COMMANDS[command]
    wrong = [float("nan"), float("inf")] if kind is float else ["7", 1.5, True]
    wrong += [] if LIMITS.get(name) == ANY else [kind(-1)]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{name} should be ") as caught:
            use(replace(config, **{name: value}))
        assert "\n" not in str(caught.value)


def test_there_are_numbers_to_look_at():
    assert len(NUMBERS) > 35


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 100},  # heads of 25 dimensions, which rotation cannot take in pairs
        {"num_heads": 3},
        {"num_kv_heads": 3},
        {"keep_checkpoints": -1},
        {"beta2": 1.0},
        {"decay_share": 1.5},
        {"report_to": ("carrier pigeon",)},
        {"selector_loss": 0.1, "cp": 2},
        {"selector_loss": 0.1, "tp": 2},
    ],
)
def test_what_cannot_be_together_is_one_line(change):
    with pytest.raises(ValueError, match=next(iter(change))) as caught:
        replace(PRESETS["demo"](), **change).validate()
    assert "\n" not in str(caught.value)
