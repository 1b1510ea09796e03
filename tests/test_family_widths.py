"""The width sweep: it runs, and it finds the drift that is there."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command
from flax import nnx

from experiments.family import widths, widths_report
from experiments.family.model import LanguageModel
from experiments.report.__main__ import main
from experiments.sweep import Files, Sweep, missing_cells, optimum

TINY = (
    "--widths 8 16 --head-size 8 --layers 1 --context 8 --batch 4 --steps 4 --warmup 1 "
    "--evaluations 1 --validation 8 --corpus-bytes 20000 --sweep.limit 0"
)


def run(*options, out):
    return run_command(widths.main, *TINY.split(), *options, "--out", out / "run")


def test_a_run_and_its_report(tmp_path, capsys):
    assert run("--scales", "mup", out=tmp_path) == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    (scale,) = summary["scales"]
    assert scale["scale"] == "mup" and scale["optimum"].keys() == {"8", "16"}
    assert summary["cells_total"] == 2 * 3
    for name in ("widths.png", "report.html"):
        (folder / name).unlink()
    main(str(folder))
    assert (folder / "widths.png").exists() and (folder / "report.html").exists()
    assert "Best rate by size" in capsys.readouterr().out
    # Wider models are added to the same folder.
    assert run("--widths", 8, 16, 24, "--scales", "mup", out=tmp_path) == 0
    assert "trainings left: 3" in " ".join(capsys.readouterr().out.split())


def test_a_run_over_depths_on_the_hyperball(tmp_path, monkeypatch):
    """A matrix keeps its norm there; its optimizer is MuonH, and layers are added."""
    trained = []

    def train(config, text, optimizer, rate, seed, show, device):
        trained.append((optimizer, config.layers, config.width, rate))
        loss = 2 + (np.log2(rate / 0.08) + seed * np.log2(config.layers) / 8) ** 2
        row = {"validation_loss": loss, "diverged": False, "milliseconds_per_step": 1.0}
        return [row | {"step": 4, "train_loss": 1.0}], row

    monkeypatch.setattr(widths, "train_cell", train)
    options = ["--scales", "mup", "hyperball", "--depths", 1, 2, "--seeds", 2]
    assert run(*options, out=tmp_path) == 0
    assert {(name, layers) for name, layers, *_ in trained} == {
        (name, layers) for name in ("muon", "muonh") for layers in (1, 2)
    }
    assert {width for *_, width, _ in trained} == {128}
    assert {rate for name, *_, rate in trained if name == "muonh"} == {0.04, 0.08, 0.16}
    mup, hyperball = json.loads((tmp_path / "run" / "summary.json").read_text())["scales"]
    assert (mup["scale"], hyperball["scale"]) == ("mup", "hyperball")
    assert mup["over"] == "layers" and mup["optimum"].keys() == {"1", "2"}
    # Seed 1's optimum falls by an eighth of a power of two with a doubling of the layers.
    assert hyperball["drift_by_seed"] == pytest.approx({"0": 0, "1": -1 / 8}, abs=1e-6)
    assert hyperball["drift"] == pytest.approx(-1 / 16, abs=1e-6)


def test_wrong_widths_are_refused(tmp_path, capsys):
    for options, hint in (
        (["--widths", "8", "12"], "--width 12"),
        (["--widths", "8", "8"], "requires one or more different values"),
    ):
        with pytest.raises(SystemExit):
            run(*options, out=tmp_path)
        captured = capsys.readouterr()
        assert hint in captured.out + captured.err


@pytest.mark.parametrize("drift", [0.0, -0.5, 0.7])
def test_the_drift_of_synthetic_losses(drift):
    """Losses that are parabolas in log2(rate), whose lowest points move by `drift` a doubling."""
    arms = {("mup", width): 0.04 for width in (64, 128, 256)}
    rows = []
    while cells := missing_cells(rows, widths.Cell, arms, 1, Sweep()):
        for cell in cells:
            top = np.log2(0.03) + drift * np.log2(cell.width / 128)
            loss = 2 + 0.1 * (np.log2(cell.rate) - top) ** 2
            rows.append(cell._asdict() | {"diverged": False, "validation_loss": float(loss)})
    (found,) = widths_report.aggregate(Files({}, {}, rows, [], {}))
    assert found.drift == pytest.approx(drift, abs=1e-6)
    assert found.lines[1].optimum == pytest.approx(0.03)
    assert not any(line.best.at_edge for line in found.lines)


def test_an_optimum_without_two_finite_neighbours_is_the_best_rate():
    assert optimum({0.1: 1.0, 0.2: 2.0}, 0.1) == 0.1
    assert optimum({0.1: 2.0, 0.2: 1.0, 0.4: float("inf")}, 0.2) == 0.2
    assert optimum({0.1: 2.0, 0.2: 1.0, 0.4: 2.0}, 0.2) == pytest.approx(0.2)


def test_over_the_width_activations_keep_their_size_and_logits_shrink():
    @functools.partial(jax.jit, static_argnums=0)
    def sizes(width):
        model = LanguageModel(width=width, layers=1, head_size=32, rngs=nnx.Rngs(0))
        tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 256)
        added = model.blocks[0](model.embedding(tokens)) - model.embedding(tokens)
        return jnp.std(added), jnp.std(model(tokens)[0])

    hidden, logits = np.array([sizes(width) for width in (64, 128, 512)]).T
    assert hidden.max() / hidden.min() < 1.3
    np.testing.assert_allclose(logits * np.sqrt([64, 128, 512]), logits[1] * 128**0.5, rtol=0.1)
