"""Every option stands once: the dataclass and the command line agree in names, help, defaults and ranges."""

import argparse
import math
from dataclasses import fields

import pytest
from helpers import call

import calibrate
import eval
from support.settings import Evaluation, Settings, add_options, flag

COMMANDS = {Settings: calibrate, Evaluation: eval}
OPTIONS = [(kind, f) for kind in COMMANDS for f in fields(kind)]
NUMBERS = [  # each number with an end of its range, and the next one beyond it
    (kind, f.name, end, end + step)
    for kind, f in OPTIONS
    for end, step in zip(f.metadata["range"], (-1, 1))
    if math.isfinite(end)
]


def parse(kind: type, *arguments):
    """What the command line of these settings makes of its arguments."""
    parser = argparse.ArgumentParser()
    add_options(parser, kind)
    return kind(**vars(parser.parse_args(arguments)))


@pytest.mark.parametrize("kind, field", OPTIONS, ids=[f"{kind.__name__}-{f.name}" for kind, f in OPTIONS])
def test_every_field_is_an_option_with_its_help_and_its_default(kind, field):
    parser = argparse.ArgumentParser()
    add_options(parser, kind)
    said = next(a.help for a in parser._actions if flag(field.name) in a.option_strings)
    assert said.startswith(field.metadata["text"])
    default = field.metadata.get("shown", field.default)
    if default is not None and default is not False:
        assert said.endswith(f"(default: {default})")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=["calibrate", "eval"])
def test_help_has_no_option_that_is_no_field_but_the_preset(command):
    kind = next(kind for kind, of in COMMANDS.items() if of is command)
    said = call(command.main, "--help").out.split("options:")[1]
    flags = {word.strip(",[]") for line in said.splitlines() if line.startswith("  -") for word in line.split()[:3]}
    flags = {word for word in flags if word.startswith("--") and not word.startswith("--no-")}
    assert flags - {"--paper"} == {flag(f.name) for f in fields(kind)} | {"--help"}


@pytest.mark.parametrize("kind", COMMANDS)
def test_what_is_not_given_keeps_the_default(kind):
    assert parse(kind) == kind()


def test_what_is_given_is_set_and_nothing_else():
    given = parse(Settings, "--bits", "2", "--tau", "0.5", "--no-local", "--dequantized", "--text", "a.txt")
    changed = {key: str(value) for key, value in vars(given).items() if value != getattr(Settings(), key)}
    assert changed == {"bits": "2", "tau": "0.5", "local": "False", "dequantized": "True", "text": "a.txt"}


@pytest.mark.parametrize("kind, name, end, beyond", NUMBERS)
def test_a_number_beyond_its_range_is_refused_by_both_alike(kind, name, end, beyond):
    assert getattr(kind(**{name: end}), name) == end
    with pytest.raises(ValueError) as refused:
        kind(**{name: beyond})
    result = call(COMMANDS[kind].main, flag(name), beyond)
    assert result.code == 2 and f"{flag(name)} {beyond}: " in result.err.replace(f"{float(beyond)}:", f"{beyond}:")
    assert str(refused.value).split(": ")[1] == result.err.strip().split(": ")[-1]
