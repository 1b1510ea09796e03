"""The command lines of all studies agree: one option has one name, one type and one meaning."""

import ast
import collections
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing

import pytest
import tyro

from experiments import runs
from experiments.bench import __main__ as bench
from experiments.command_line import RENAMED, parse
from experiments.commands import option
from experiments.family import config as family
from experiments.family import widths
from experiments.finetune import command as finetune
from experiments.finetune import sample as finetune_sample
from experiments.grok import config as grok
from experiments.grok import speed as grok_speed
from experiments.pretrain import __main__ as pretrain
from experiments.pretrain import export, sample
from experiments.pretrain import speed as pretrain_speed

COMMANDS = {
    "grok": grok.Config,
    "grok.speed": grok_speed.Command,
    "family": family.Config,
    "family.widths": widths.Config,
    "pretrain": pretrain.Command,
    "pretrain.speed": pretrain_speed.Command,
    "pretrain.sample": sample.Command,
    "pretrain.export": export.Command,
    "finetune": finetune.Command,
    "finetune.sample": finetune_sample.Command,
    "bench": bench.Config,
}
# Passes over a table of equations are counted whole; one over rows of a user's may be a part. And
# what exports or samples has no backward pass, whose precision --dtype is of elsewhere.
APART = {("--epochs", "grok"), ("--epochs", "grok.speed")}
APART |= {("--dtype", "pretrain.export"), ("--dtype", "finetune.sample")}
POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]


@functools.cache
def helps(kind):
    """The string after each field of a dataclass, and of those that it inherits from."""
    found = {}
    for base in reversed(kind.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except (OSError, TypeError):  # builtins, and what is made by make_dataclass
            continue
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def kind_of(hint):
    """A type without None, and without the choices of a word, which are a study's own."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return frozenset().union(*(kind_of(x) for x in arguments if x is not type(None)))
    if typing.get_origin(hint) is typing.Literal:
        return frozenset({"choice"})
    if typing.get_origin(hint) is tuple:
        return frozenset({("tuple", *(kind_of(x) for x in arguments if x is not Ellipsis))})
    return frozenset({hint})


def options(kind, *path):
    """`(option, type, help)` of a command, with those of its groups."""
    hints, marked = (typing.get_type_hints(kind, include_extras=more) for more in (False, True))
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options(hint, *path, field.name)
        elif field.name in helps(kind) and POSITIONAL not in typing.get_args(marked[field.name]):
            yield option(*path, field.name), kind_of(hint), helps(kind)[field.name]


def test_options_that_studies_share_have_one_type_and_one_meaning():
    """The first sentence of a help text is the meaning; defaults and choices may follow."""
    seen = collections.defaultdict(lambda: collections.defaultdict(set))
    for command, kind in COMMANDS.items():
        for name, of, text in options(kind):
            if (name, command) not in APART:
                seen[name][of, text.split(". ")[0].rstrip(".")].add(command)
    shared = {name: of for name, of in seen.items() if sum(map(len, of.values())) > 1}
    assert {"--optimizers", "--out", "--batch", "--suite", "--final-lr-fraction"} <= shared.keys()
    assert not {name: dict(of) for name, of in shared.items() if len(of) > 1}


def test_every_option_says_what_it_is_in_a_sentence():
    for command, kind in COMMANDS.items():
        for name, _, text in options(kind):
            assert text.endswith(".") and not text.startswith(("Of ", "What ", "Which ")), (
                command,
                name,
                text,
            )


@pytest.mark.parametrize("old", sorted(RENAMED))
@pytest.mark.parametrize("command", COMMANDS)
def test_an_old_name_is_refused_with_the_new_one(command, old):
    assert old not in {name for name, *_ in options(COMMANDS[command])}
    for words in ([old, "x"], [f"{old}=x"]):
        with pytest.raises(ValueError, match=f"{old} has been renamed; use {RENAMED[old]}"):
            parse(COMMANDS[command], command, words)


def test_an_unknown_option_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(grok.Config, "grok", ["--optimisers", "muon"])
    assert ended.value.code == 2 and "--optimizers" in capsys.readouterr().err


def test_settings_of_earlier_versions_are_read_by_the_names_of_today(tmp_path):
    old = {"optimizer": ["adamw", "muon"], "final": 0.1, "patience": 10, "steps": 5}
    new = {"optimizers": ["adamw", "muon"], "final_lr_fraction": 0.1, "max_nonfinite_steps": 10}
    runs.write_json(tmp_path / "config.json", old)
    assert runs.known_settings(tmp_path) == new | {"steps": 5}
    # The name of the one optimizer of a run, and what all arms share, stay where they are.
    for one in ("muon", {"beta": 0.95}):
        assert runs.current_names({"optimizer": one, "arms": ["adamw"]}) == {
            "optimizer": one,
            "optimizers": ["adamw"],
        }
    # So the run goes on under the names of today.
    runs.claim(tmp_path, new | {"steps": 5}).close()
