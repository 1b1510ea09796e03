"""A run's folder read back: it is the run that was saved, whole, finite, and with its tokenizer."""

import dataclasses
import json
import shutil
import sys

import jax.numpy as jnp
import pytest
from pretraining import DENSE, VOCABULARY, one_device, training

from experiments.language import tokenizer
from experiments.language.checkpoints import Checkpoints
from experiments.pretrain import export, sample, trained
from experiments.pretrain.step import Trainer
from experiments.runs import RunError

CONFIG = training(model=DENSE)


def saved(folder, states, config=CONFIG):
    """A folder with a checkpoint of each state, as training leaves it."""
    source = tokenizer.train(["to be or not"], 320, config.data.end_of_text).decode()
    settings = trained.settings_of("adamw", config)
    meta = {"config": settings, "tokenizer_sha256": trained.digest_of(source)}
    checkpoints = Checkpoints(folder / "checkpoints")
    for step, state in enumerate(states, 1):
        checkpoints.save(step, state, meta)
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(source)


@pytest.fixture(scope="module")
def state():
    return Trainer(CONFIG, "adamw", one_device(), VOCABULARY).start(0)


@pytest.fixture(scope="module")
def run(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saved(folder, [state, state])
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def command(main, *arguments):
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(sys, "argv", ["command", *map(str, arguments)])
        return main()


@pytest.mark.parametrize("config", [None, "{", "[]", "[" * 100_000])
def test_a_lost_config_is_read_from_the_checkpoint(copy, config):
    (copy / "config.json").unlink()
    if config is not None:
        (copy / "config.json").write_text(config)
    assert trained.load_run(copy).config.model == DENSE


@pytest.mark.parametrize("change", [{"heads": 2}, {"rope_base": 5e5}])
def test_a_config_that_is_not_the_saved_one_is_refused(copy, change, capsys):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(DENSE, **change))
    (copy / "config.json").write_text(json.dumps(trained.settings_of("adamw", other)))
    with pytest.raises(RunError, match=r"config.json and its newest .* to different runs"):
        trained.load_run(copy)
    for main, more in ((sample.main, ()), (export.main, (copy / "model",))):
        assert command(main, copy, *more) == 2
        assert "to different runs" in capsys.readouterr().err
    assert not (copy / "model").exists()


def test_the_tokenizer_is_the_one_that_was_saved(copy):
    path = copy / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"!"', '"?"', 1))
    with pytest.raises(RunError, match="is not the tokenizer that the run was trained with"):
        trained.load_run(copy)
    path.unlink()
    with pytest.raises(RunError, match="is missing"):
        trained.load_run(copy)


def test_which_checkpoint_is_taken_in_place_of_a_damaged_one_is_said_aloud(copy, capsys):
    newest = copy / "checkpoints" / "step_2"
    flip(max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    trained.load_run(copy)
    said = capsys.readouterr().err
    assert "skipped, and that of step 1 is used: step 2: " in said
    assert "has changed since it was written" in said
    for main, more in ((sample.main, ("--length", 1)), (export.main, (copy / "model",))):
        assert command(main, copy, *more) == 0
        assert "that of step 1 is used" in capsys.readouterr().err


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_params_that_are_not_finite_are_refused(state, tmp_path, value, capsys):
    scale = state.params["norm"]["scale"].at[0].set(value)
    broken = state._replace(params=state.params | {"norm": {"scale": scale}})
    saved(tmp_path, [broken])
    with pytest.raises(
        RunError, match=r"NaN or Inf in 1 parameters, the first being params/norm/scale"
    ):
        trained.load_run(tmp_path)
    assert command(export.main, tmp_path, tmp_path / "model") == 2
    assert "NaN or Inf" in capsys.readouterr().err and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"arm": "adamw", "seed": 0}, {"tasks": ["mul"], "optimizers": ["adamw"]}]
)
def test_another_study_s_folder_is_refused_in_one_line(tmp_path, settings, capsys):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for main, more in ((sample.main, ()), (export.main, (tmp_path / "model",))):
        assert command(main, tmp_path, *more) == 2
        error = capsys.readouterr().err
        assert "is not of a run of this study" in error and "Traceback" not in error
