"""Settings of all studies: those that make no sense are refused, and defaults follow the others."""

import functools
import json
import sys

import pytest
import tyro

from experiments import optimizers, settings
from experiments.bench.__main__ import Config as Bench
from experiments.family import __main__ as family
from experiments.family import widths
from experiments.finetune import command as finetune
from experiments.grok import suites
from experiments.grok.config import Config as Grok
from experiments.grok.speed import Command as Speed
from experiments.language.processes import Processes
from experiments.pretrain import __main__ as pretrain
from experiments.pretrain.config import as_json


def parse_family(kind, words):
    default = family.fitted(kind(), words) if kind is family.Config else kind()
    return tyro.cli(kind, args=words, default=default)


PARSERS = {
    "grok": lambda words: tyro.cli(Grok, args=words, default=suites.defaults(words)),
    "family": functools.partial(parse_family, family.Config),
    "widths": functools.partial(parse_family, widths.Config),
    "pretrain": pretrain.parse,
    "finetune": finetune.parse,
    "speed": lambda words: tyro.cli(Speed, args=words),
    "bench": lambda words: tyro.cli(Bench, args=words),
}


def refused(study, line, capsys):
    """The one sentence of an error."""
    try:
        PARSERS[study](line.split())
    except ValueError as error:
        return str(error)
    except SystemExit:
        return " ".join(capsys.readouterr().err.replace("│", "").split())
    return "nothing"


@pytest.mark.parametrize("study", ["grok", "family", "pretrain"])
@pytest.mark.parametrize(
    "line, message",
    [
        ("--muon.learning-rate 0", "--muon.learning-rate must be greater than 0"),
        ("--muon.learning-rate 1e39", "must be a finite number of at most 3.4e+38; got 1e+39"),
        ("--adamw.learning-rate nan", "--adamw.learning-rate must be a finite number"),
        ("--adamw.learning-rate -1", "--adamw.learning-rate must be greater than 0"),
        ("--adamw.eps 0", "--adamw.eps must be greater than 0"),
        ("--adamw.eps 1e-300", "--adamw.eps must be greater than 0, in float32 too; got 1e-300"),
        ("--adamw.b2 1", "--adamw.b2 must be at least 0 and less than 1"),
        ("--muon.beta -0.5", "--muon.beta must be at least 0 and less than 1"),
        ("--muon.weight-decay -1", "--muon.weight-decay must be at least 0"),
        ("--rates.scion -1", "--rates.scion must be greater than 0"),
        ("--rates.normuon nan", "--rates.normuon must be a finite number"),
        ("--variants.rank 0", "or a fraction greater than 0 and at most 1; got 0"),
        ("--variants.rank 1.5", "at most 1; got 1.5"),
        ("--variants.blocks 2 0", "--variants.blocks must be at least 1; got 0"),
        ("--variants.period 0", "--variants.period must be at least 1"),
        ("--warmup -1", "--warmup must be at least 0"),
        ("--batch 0", "--batch must be at least 1"),
        ("--seeds 0", "--seeds must be at least 1"),
    ],
)
def test_settings_of_all_optimizers_are_held_to_one_rule(study, line, message, capsys):
    assert message in refused(study, line, capsys)


@pytest.mark.parametrize(
    "study, line, message",
    [
        ("grok", "--taks mul", "--tasks"),
        ("grok", "--tasks mull", "'mul'"),
        ("grok", "--width 17", "try --width 16"),
        ("grok", "--width 30 --heads 4", "try --width 24"),
        ("grok", "--train-fraction 1.5", "both must have at least one"),
        ("grok", "--muon.scale huge", "'spectral'"),
        ("grok", "--grid width=32 width=64", "must name each setting once, with all its values"),
        ("grok", "--grid width=32,-64", "--width must be at least 1; got -64"),
        ("grok", "--grid muon.learning-rate=0.1,0", "--muon.learning-rate must be greater than 0"),
        ("grok", "--dropout nan", "--dropout must be a finite number"),
        ("grok", "--dropout 1", "less than 1, as a probability; got 1"),
        ("grok", "--train-fraction nan", "--train-fraction must be a finite number"),
        ("grok", "--together 0", "--together must be at least 1"),
        ("grok", "--tasks mul mul", "--tasks requires one or more different values"),
        ("family", "--optimizers adam", "'adamw'"),
        ("family", "--optimizers muon muon", "requires one or more different values"),
        ("family", "--steps 7 --warmup 2 --evaluations 2", "try --steps 6"),
        ("family", "--head-size 5", "even for RoPE"),
        ("family", "--muon.lerning-rate 1", "--muon.learning-rate"),
        ("family", "--sweep.factor nan", "--sweep.factor must be a finite number"),
        ("family", "--sweep.factor 1", "--sweep.factor must be greater than 1"),
        ("family", "--corpus-bytes -3", "--corpus-bytes must be at least 1"),
        ("family", "--steps 20 --warmup 20", "--warmup must be less than --steps 20; got 20"),
        ("widths", "--widths 64 0", "--widths must be at least 1"),
        ("widths", "--widths 64 64", "--widths requires one or more different values"),
        ("widths", "--muon.beta 2", "--muon.beta must be at least 0"),
        ("pretrain", "--clip -1", "--clip must be greater than 0; a large number clips nothing"),
        ("pretrain", "--clip inf", "--clip must be a finite number"),
        ("pretrain", "--final-lr-fraction -3", "--final-lr-fraction must be from 0 to 1; got -3"),
        ("pretrain", "--spike -1", "--spike must be greater than 1; got -1"),
        ("pretrain", "--samples -1", "--samples must be at least 0; got -1"),
        ("pretrain", "--seed -1", "--seed must be at least 0"),
        ("pretrain", "--mesh.tensor 0", "--mesh.tensor must be at least 1, or -1"),
        ("pretrain", "--context 0", "--context must be at least 1"),
        (
            "pretrain",
            "--evaluation-tokens 9",
            "--evaluation-tokens must be at least --context 256; got 9",
        ),
        ("pretrain", "--data.vocabulary 0", "--data.vocabulary must be at least 1"),
        ("pretrain", "--tokens-per-param nan", "--tokens-per-param must be a finite number"),
        ("pretrain", "--model.init-std 0", "--model.init-std must be greater than 0"),
        ("pretrain", "--model.rope-base nan", "--model.rope-base must be a finite number"),
        ("pretrain", "--profile 5 2", "--profile must be FIRST END"),
        ("pretrain", "--max-checkpoints 0", "--max-checkpoints must be at least 1"),
        ("pretrain", "--processes.index -1", "--processes.index must be at least 0"),
        ("pretrain", "--steps -5", "--steps must be at least 1; got -5"),
        ("pretrain", "--steps 24 --warmup 40", "together must be less than --steps 24; got 40"),
        ("finetune", "--clip nan", "--clip must be a finite number"),
        ("finetune", "--clip-share nan", "--clip-share must be a finite number"),
        ("finetune", "--device-memory nan", "--device-memory must be a finite number"),
        ("finetune", "--mesh.data -2", "--mesh.data must be at least 1, or -1"),
        ("finetune", "--save-every 0", "--save-every must be at least 1"),
        ("speed", "--rounds 1", "--rounds must be at least 2; got 1"),
        ("speed", "--rounds 9 --epochs 3", "--epochs must be at least --rounds 9; got 3"),
        ("speed", "--layers 0", "--layers must be at least 1; got 0"),
        ("speed", "--width -16", "--width must be at least 1; got -16"),
        ("speed", "--width 17", "--width 17 must be a multiple of 2 × --heads"),
        ("speed", "--batch 0", "--batch must be at least 1; got 0"),
        ("bench", "--rounds 0", "--rounds must be at least 1; got 0"),
        ("bench", "--devices 5", "--devices must be even and at least 4; got 5"),
        ("bench", "--width 0", "--width must be at least 1; got 0"),
        ("bench", "--parts speed speed", "--parts requires one or more different values"),
        ("bench", "--parts", "--parts requires one or more different values; got none"),
    ],
)
def test_settings_of_one_study_are_held_to_theirs(study, line, message, capsys):
    assert message in refused(study, line, capsys)


def test_a_rule_is_of_what_it_stands_beside():
    with pytest.raises(ValueError, match="--count must be at least 1; got 0"):
        settings.check(Processes(count=0))
    with pytest.raises(ValueError, match=r"--adamw\.eps must be"):
        settings.check(optimizers.Settings(optimizers.AdamW(eps=-1.0)))
    settings.check(Processes())  # what may be None is


@pytest.mark.parametrize(
    "study, line, found",
    [
        ("pretrain", "--preset tiny --steps 24", {"warmup": 2}),
        ("pretrain", "", {"warmup": 40, "steps": 400, "accumulate": 1}),
        ("pretrain", "--steps=24 --warmup=20", {"warmup": 20}),
        ("pretrain", "--preset moonlight-16b", {"warmup": 2000, "cooldown": 31_000}),
        ("pretrain", "--preset moonlight-16b --steps 100", {"warmup": 10, "cooldown": 10}),
        ("pretrain", "--preset nanogpt-124m --batch 4", {"accumulate": 4}),
        ("pretrain", "--preset nanogpt-124m --batch 6 --accumulate 2", {"accumulate": 2}),
        ("pretrain", "--preset nanogpt-124m --model.layers 3", {"model.dense_layers": 3}),
        ("pretrain", "--preset tiny --model.layers 6", {"model.dense_layers": 1}),
        ("pretrain", "--model.experts 1", {"model.active": 1}),
        ("pretrain", "--context 65536", {"evaluation_tokens": 65_536}),
        ("pretrain", "--suite optimizers --steps 40", {"warmup": 4}),
        ("family", "--steps 100", {"evaluations": 5, "warmup": 10}),
        ("family", "--steps 12 --width 48", {"evaluations": 6, "warmup": 1, "head_size": 24}),
        ("family", "", {"evaluations": 6, "warmup": 20, "head_size": 32}),
        ("grok", "--width 50", {"heads": 1}),
        ("grok", "--width 64", {"heads": 2}),
        ("finetune", "--steps 24", {"steps": 24}),
        ("finetune", "--epochs 2", {"steps": 0}),
        ("finetune", "--epochs 2 --steps 9", {"steps": 9}),
        ("finetune", "", {"steps": 100}),
    ],
)
def test_defaults_follow_what_is_given(study, line, found):
    parsed = PARSERS[study](line.split())
    for name, value in found.items():
        assert functools.reduce(getattr, name.split("."), parsed) == value, name


def test_mesh_and_folder_are_checked_before_text_is_read(monkeypatch, capsys, tmp_path):
    def read(*_):
        raise AssertionError("text was read")

    monkeypatch.setattr(pretrain.data, "prepare", read)
    words = ["pretrain", "--out", str(tmp_path / "run")]
    for more, message in (
        ("--mesh.fsdp 3", "does not fit 16 devices"),
        ("--mesh.fsdp 16", "which must be a multiple of the mesh axes data × fsdp × expert = 16"),
        ("--mesh.fsdp 2 --mesh.tensor 8", "--mesh.tensor must divide the model's heads, 4"),
        ("--suite scaling --widths 33", "--widths must be multiples of the head size"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *more.split()])
        assert pretrain.main() == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    other = {"optimizer": "muon"} | as_json(pretrain.parse(["--seed", "5"]))
    (tmp_path / "run" / "config.json").write_text(json.dumps(other))
    monkeypatch.setattr(
        sys, "argv", [*words, "--optimizers", "adamw", "--mesh.fsdp", "8", "--mesh.tensor", "2"]
    )
    assert pretrain.main() == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_a_start_without_text_leaves_the_folder_free(monkeypatch, capsys, tmp_path):
    words = f"pretrain --out {tmp_path} --optimizers adamw --mesh.fsdp 8 --mesh.tensor 2"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--data.files", str(tmp_path / "no*.txt")])
    assert pretrain.main() == 2
    assert "matches no file" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
