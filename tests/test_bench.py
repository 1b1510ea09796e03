"""`python -m experiments.bench`: its rows, its files, and what it says if something is missing."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.bench import __main__ as bench
from experiments.bench import arms, cases, sharding, spectra, speed

PNG = b"\x89PNG"
TINY = ["--devices", "8", "--layers", "8", "--width", "32", "--rounds", "1"]


@pytest.fixture(scope="module")
def tiny_cases():
    return cases.simulated_cases(jax.devices()[:8], layers=8, width=32, hidden=64)


def named(cases, part):
    return next(case for case in cases if part in case.name)


def test_the_command_writes_its_rows_and_figures(tmp_path, monkeypatch, capsys):
    every = bench.simulated_table
    monkeypatch.setattr(bench, "simulated_table", lambda config: every(config)[4:5])
    monkeypatch.setattr(spectra, "SHAPES", ((16, 64),))
    monkeypatch.setattr(spectra, "SCHEDULES", ("jordan",))
    monkeypatch.setenv("COLUMNS", "200")

    arguments = ["--parts", "sharding", "spectra", *TINY, "--out", str(tmp_path), "--name", "tiny"]
    assert bench.main(arguments) == 0

    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text(encoding="utf-8"))
    assert summary["config"]["devices"] == 8
    assert {"jax", "jaxlib", "optax", "libtpu", "torch"} <= summary["machine"].keys()
    names = [(row["case"], row["arm"]) for row in summary["sharding"]]
    assert len(names) == len(set(names)) == 2
    assert len(summary["spectra"]) == len(spectra.SPECTRA) * len(spectra.DTYPES) * 3
    for part in ("sharding", "spectra"):
        assert (tmp_path / "tiny" / f"{part}.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "raises ShardingTypeError" in printed
    assert "Singular values" in printed


def test_rows_tell_ours_from_propagation(tiny_cases):
    case = named(tiny_cases, "8 layers stacked")
    ours, plain = (
        sharding.cost(case, arm, jnp.float32) for arm in ("muon_jax", "plain propagation")
    )
    assert ours["raises"] is plain["raises"] is None
    assert ours["flops_ratio"] <= 1.05 < plain["flops_ratio"]
    assert ours["bytes_ratio"] < plain["bytes_ratio"]
    assert set(ours["collectives"]) == {"all-to-all"}
    assert ours["ns_dtype"] == "float32"


def test_experts_that_lie_whole_on_their_devices_move_nothing(tiny_cases):
    case = named(tiny_cases, "[E, L, D, F]")
    row = sharding.cost(case, "muon_jax, shardings=", jnp.float32)
    assert (row["exchanged_bytes"], row["collectives"]) == (0, {})


def test_a_rival_that_raises_has_a_row_that_says_so(tiny_cases):
    row = sharding.cost(named(tiny_cases, "Explicit, stacked"), "optax.contrib", jnp.float32)
    assert row["raises"] == "ShardingTypeError"
    assert "flops_ratio" not in row
    assert sharding.table([row]).row_count == 1


def test_state_lies_like_the_params(tiny_cases):
    case = named(tiny_cases, "tp 2, 8 layers separate")
    tx = arms.ours(case, jnp.float32)
    state = sharding.laid_out(case, jax.eval_shape(tx.init, case.params))
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert specs == {P("fsdp", "tp")}
    assert all(leaf.sharding.spec == P() for leaf in jax.tree.leaves(state) if not leaf.ndim)


def test_what_the_ratios_are_of():
    mesh = cases.make_mesh(jax.devices(), {"fsdp": 4, "tp": 2})
    shapes = {"up": (3, 32, 64), "square": (32, 32)}
    case = cases.on_mesh("by hand", mesh, shapes, ("fsdp", "tp"))
    up, square = 4 * 64 * 32**2 + 2 * 32**3, 6 * 32**3
    assert case.standard_flops() == 5 * (3 * up + square)
    assert case.shard_bytes() == 2 * (3 * 32 * 64 + 32 * 32) // 8
    assert case.params["up"].sharding.spec == P(None, "fsdp", "tp")


@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
def test_the_matrices_have_the_spectra_they_are_named_for(spectrum):
    u, sigma, v = spectra.matrix(spectrum, 16, 64)
    x = u * sigma @ v.T
    assert np.linalg.norm(x) == pytest.approx(1)
    np.testing.assert_allclose(np.linalg.svd(x, compute_uv=False), sigma, atol=1e-12)
    if spectrum == "1/k":
        assert sigma[0] / sigma[9] == pytest.approx(10)
    if spectrum == "exponential":
        assert sigma[0] / sigma[-1] == pytest.approx(1e6)


def test_restarts_are_what_keeps_bfloat16_together():
    rows = spectra.singular_values("1/k", (128, 256), "polar_express", "bfloat16")
    largest = {row["form"]: row["largest"] for row in rows}
    assert largest["standard"] < 1.21 and largest["Gram"] < 1.21 < 10 < largest["Gram, no restart"]
    for row in rows:
        assert len(row["sigma"]) == len(row["mapped"]) < 128
        assert bool(row["restarts"]) == (row["form"] == "Gram")


def test_optimizers_take_turns_on_the_same_tree(monkeypatch):
    monkeypatch.setitem(speed.GEMM_SIDES, "cpu", 64)
    layer = cases.layer(1, 16, 32)
    names = ("muon_jax float32", "muon_jax bfloat16", "optax.contrib", "torch.optim")
    tree = speed.Tree("tiny", cases.stacked(layer, 2), names)
    rows = {row["arm"]: row for row in speed.compare(tree, rounds=2, backend="cpu")}
    if importlib.util.find_spec("torch") is None:
        assert rows["torch.optim"]["raises"] == "ModuleNotFoundError"
    else:
        assert "torch.optim" in rows["muon_jax float32"]["speedup"]
    ours = rows["muon_jax bfloat16"]
    assert len(ours["times"]) == len(ours["gemm_times"]) == 2
    assert ours["dtype"] == "bfloat16"
    assert ours["speedup"]["optax.contrib"] == speed.spread(
        rows["optax.contrib"]["times"], ours["times"]
    )
    products = speed.standard_flops(tree.shapes) / (2 * 64**3)
    standard = [seconds * products for seconds in ours["gemm_times"]]
    assert ours["standard_ratio"] == speed.spread(ours["times"], standard)
    assert speed.table(list(rows.values())).row_count == 4
    assert speed.figure(list(rows.values())).axes


def test_a_ratio_is_taken_round_by_round():
    assert speed.spread([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3, "min": 2, "max": 4}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"devices": 3}, "--devices must be even and at least 4"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"parts": ()}, "--parts must name one or more, each of them once; got none"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        bench.Config(**settings)


def test_more_devices_than_there_are_is_an_error(tmp_path, capsys):
    arguments = ["--parts", "sharding", "--devices", "4096", "--out", str(tmp_path)]
    assert bench.main(arguments) == 2
    assert f"and JAX has {jax.device_count()}" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--help"])
    assert exit_.value.code == 0
    assert "--topology" in capsys.readouterr().out


def test_a_topology_without_libtpu_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert bench.main(["--topology", "v5e:16x16", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "libtpu, which is not installed" in printed
    assert 'pip install -e ".[experiments,tpu]"' in printed
    assert not list(tmp_path.iterdir())


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[tpu]'",
)


@needs_libtpu
def test_a_topology_compiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    size = ["--layers", "4", "--width", "256"]
    assert bench.main(["--topology", "v5e:2x2", *size, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "v5e-2x2" / "summary.json").read_text(encoding="utf-8"))
    ours = summary["sharding"][0]
    assert ours["raises"] is None and ours["ns_dtype"] == "bfloat16"
    assert 0 < ours["flops_ratio"] < 1.2


@needs_libtpu
def test_an_unknown_topology_is_named(tmp_path, capsys):
    assert bench.main(["--topology", "nonsense:3", "--out", str(tmp_path)]) == 2
    assert "libtpu makes no topology 'nonsense:3'" in capsys.readouterr().err
