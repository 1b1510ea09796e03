"""`python -m experiments.bench`: its rows, its files, and what it says if something is missing."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import devices_of

import muon_jax
from experiments.bench import __main__ as bench
from experiments.bench import accelerators, arms, cases, sharding, spectra, speed
from experiments.bench.all_to_all import all_to_all_muon
from experiments.roofline import CHIPS, Chip
from experiments.topology import TopologyError
from muon_jax._sharding.layout import Placing

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

    arguments = ["--parts", "sharding", "spectra", *TINY, "--out", str(tmp_path / "tiny")]
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


# Of four squares and four rectangles, on a GPU all in one call. The widths differ since nothing
# that is cached for the one platform may serve the other.
@pytest.mark.parametrize(("platform", "width", "together"), [("gpu", 16, 8), ("tpu", 24, 4)])
def test_propagation_makes_no_stack_of_leaves_apart(platform, width, together, monkeypatch):
    monkeypatch.setattr(Placing, "platform", platform)
    mesh = cases.make_mesh(jax.devices(), {"fsdp": 8})
    tree = cases.separate(cases.layer(2, width, 2 * width), 2)
    case = cases.on_mesh("apart", mesh, tree, ("fsdp", None))

    def stacks(arm):
        tx = arms.ARMS[arm](case, jnp.bfloat16)
        state = jax.eval_shape(tx.init, case.params)
        program = str(jax.make_jaxpr(tx.update)(case.params, state, case.params))
        return {int(n) for n in re.findall(rf"bf16\[(\d+),{width},{width}\]", program)}

    def on_one_device(case, dtype):
        alone = cases.make_mesh(jax.devices(), {"alone": 1})
        return muon_jax.muon(0.02, ns_dtype=dtype, mesh=alone)

    monkeypatch.setitem(arms.ARMS, "on one device", on_one_device)
    assert not stacks(cases.PLAIN)
    assert max(stacks("on one device")) == together


def test_propagation_on_devices_that_are_not_here():
    mesh = cases.make_mesh(devices_of("v5e:2x2"), {"fsdp": 4})
    tree = cases.separate(cases.layer(1, 128, 256), 1)
    case = cases.on_mesh("away", mesh, tree, ("fsdp", None), dtype=jnp.bfloat16)
    row = sharding.cost(case, cases.PLAIN, jnp.bfloat16)
    assert row["raises"] is None
    assert row["collectives"] and "all-to-all" not in row["collectives"]


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
    assert len(sharding.table([row]).lines) == 1


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
    assert len(speed.table(list(rows.values())).lines) == 4
    assert speed.figure(list(rows.values())).axes


def test_a_ratio_is_taken_round_by_round():
    assert speed.spread([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3, "min": 2, "max": 4}


def test_more_devices_than_there_are_is_an_error(tmp_path, capsys):
    arguments = ["--parts", "sharding", "--devices", "4096", "--out", str(tmp_path)]
    assert bench.main(arguments) == 2
    assert f"but JAX has already started with {jax.device_count()}" in capsys.readouterr().err


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


def test_a_topology_compiles(tmp_path, monkeypatch, capsys):
    devices_of("v5e:2x2")
    monkeypatch.setenv("COLUMNS", "200")
    size = ["--layers", "4", "--width", "256"]
    assert bench.main(["--topology", "v5e:2x2", *size, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    ours = summary["sharding"][0]
    assert ours["raises"] is None and ours["ns_dtype"] == "bfloat16"
    assert 0 < ours["flops_ratio"] < 1.2
    assert ours["kernels"] > 10 and ours["cycles"] > 0 and len(ours["dearest"]) == 10
    printed = capsys.readouterr().out
    assert "Roofline of TPU v5 lite" in printed and "Most expensive kernels" in printed


def test_an_unknown_topology_is_named(tmp_path, capsys):
    devices_of("v5e:2x2")
    assert bench.main(["--topology", "v5e:3", "--out", str(tmp_path)]) == 2
    assert "libtpu cannot build the topology 'v5e:3'" in capsys.readouterr().err


# --- Accelerators ----------------------------------------------------------------------------


@pytest.fixture
def cpus(monkeypatch):
    """Eight CPU devices in the place of a topology's, with a roofline."""
    chip = Chip("made up", bandwidth=1e9, flops=1e10, launch=1e-6)
    monkeypatch.setitem(CHIPS, "cpu", chip)

    def devices(name):
        if name == "missing:8":
            raise TopologyError("It needs an extra.")
        return jax.devices()[:8]

    monkeypatch.setattr(accelerators, "topology_devices", devices)
    return chip


def test_accelerators_have_every_arm_beside_the_floor(cpus, tmp_path, monkeypatch, capsys):
    """With ours in the place of all programs on as many devices, which compile elsewhere."""
    compile_step, programs = accelerators.compile_step, {}

    def one_of_each(case, tx, options):
        if case.mesh.size not in programs:
            programs[case.mesh.size] = compile_step(case, tx, options)
        return programs[case.mesh.size]

    monkeypatch.setattr(accelerators, "compile_step", one_of_each)
    monkeypatch.setattr(accelerators, "TOPOLOGIES", ("made:8", "missing:8"))
    monkeypatch.setenv("COLUMNS", "250")
    words = "--parts accelerators --layers 1 --width 16 --hidden 32 --out"
    assert bench.main([*words.split(), str(tmp_path / "made")]) == 0
    summary = json.loads((tmp_path / "made" / "summary.json").read_text(encoding="utf-8"))
    rows = [row for row in summary["accelerators"] if "case" in row]
    assert all(row["raises"] is None for row in rows), rows
    on_all = [row for row in rows if "fsdp" in row["case"]]
    assert {row["arm"] for row in on_all} == {"muon_jax", "optax.contrib", "all-to-all", "floor"}
    one = [row for row in rows if row["case"] == "1 layer of 16 / 32, separate"]
    programs = [row for row in one if row["arm"] != "floor"]
    assert {(row["arm"], row["leaves"], row["products"]) for row in programs} == {
        (arm, leaves, products)
        for arm in ("muon_jax", "optax.contrib")
        for leaves in ("float32", "bfloat16")
        for products in ("XLA's choice", "cuBLAS")
    }
    floor = next(row for row in one if row["arm"] == "floor")
    # Four squares and two of 16 × 32, each by the lesser form; five passes over float32 leaves.
    assert floor["flops"] == 4 * 20 * 16**3 + 2 * (3 * 32 * 16**2 + 17 * 16**3)
    assert floor["hbm_bytes"] == 5 * 4 * (4 * 16**2 + 2 * 16 * 32)
    assert floor["seconds"] == max(floor["flops"] / 1e10, floor["hbm_bytes"] / 1e9)
    assert all(row["seconds"] > floor["seconds"] for row in programs)
    printed = capsys.readouterr().out
    assert "It needs an extra." in printed and "Roofline of made up" in printed
    assert (tmp_path / "made" / "accelerators.png").read_bytes().startswith(PNG)


def test_accelerators_without_any_compiler_say_what_to_install(cpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerators, "TOPOLOGIES", ("missing:8",))
    assert bench.main(["--parts", "accelerators", "--out", str(tmp_path)]) == 2
    assert "It needs an extra." in capsys.readouterr().err


def test_a_program_with_products_that_cannot_be_read_has_no_figures(cpus, monkeypatch):
    made, _ = accelerators.pieces(["made:8"], 1, 16, 32)
    read = accelerators.measure

    def unread(compiled):
        return dataclasses.replace(read(compiled), unread={"mystery": 3})

    monkeypatch.setattr(accelerators, "measure", unread)
    row = accelerators.cost(made[0])
    assert row["raises"] == "FLOPs of mystery cannot be read." and "seconds" not in row
    assert accelerators.table([row]).row_count == 1


GPU, TPU, LOW, FULL = "h100:8", "v5e:2x4", "bfloat16", "float32"
CHOICE, CUBLAS = accelerators.CHOICE, accelerators.CUBLAS
LARGE = "12 layers of 768 / 3072"
TWO, FOUR = "2 layers of 768 / 3072, separate", "4 layers of 2048 / 8192, separate"
SEPARATE, ON_ALL = f"{LARGE}, separate", "8 layers of 768 / 3072, separate, fsdp 8"
# Lines of the README's table: topology, tree, leaves, products of the stored rows.
TOLD = {
    f"H100, {LARGE}, each kernel a leaf: kernels; roofline": (GPU, SEPARATE, LOW, CHOICE),
    "the same with cuBLAS products": (GPU, SEPARATE, LOW, CUBLAS),
    "the same with cuBLAS products, ours multiplies in bfloat16": (GPU, SEPARATE, FULL, CUBLAS),
    "the same, each shape one leaf": (GPU, f"{LARGE}, stacked", LOW, CHOICE),
    "H100, 4 layers of 2048 / 8192, cuBLAS": (GPU, FOUR, LOW, CUBLAS),
    "8 H100, fsdp 8, 8 layers of 768 / 3072; network not counted": (GPU, ON_ALL, LOW, CHOICE),
    "TPU v5e, 2 layers of 768 / 3072: the compiler's estimate": (TPU, TWO, LOW, CHOICE),
    "the same, ours multiplies in bfloat16": (TPU, TWO, FULL, CHOICE),
    "TPU v5e, 1 layer of 2048 / 8192": (TPU, "1 layer of 2048 / 8192, separate", LOW, CHOICE),
    "8 v5e, fsdp 8, 8 layers of 768 / 3072": (TPU, ON_ALL, LOW, CHOICE),
}


def test_the_readmes_accelerators_are_the_stored_rows():
    folder = Path(bench.__file__).parent
    text = (folder / "results" / "accelerators" / "summary.json").read_text(encoding="utf-8")
    rows = [row for row in json.loads(text)["accelerators"] if "case" in row]

    def cell(arm, *told):
        keys = ("topology", "case", "leaves", "products")
        (row,) = (r for r in rows if r["arm"] == arm and tuple(r[k] for k in keys) == told)
        if row["cycles"]:
            return f"{row['cycles'] / 1e6:#.3g} M cycles"
        return f"{row['kernels']:,}; {1e3 * row['seconds']:#.3g} ms".replace(",", " ")

    readme = (folder / "README.md").read_text(encoding="utf-8")
    for heading, told in TOLD.items():
        ours, theirs = (cell(arm, *told) for arm in ("muon_jax", "optax.contrib"))
        assert f"| {heading} | {told[2]} | {ours} | {theirs} |" in readme


@pytest.mark.parametrize("shape", [(3, 16, 32), (3, 32, 16), (16, 32)])
def test_the_all_to_all_rival_orthogonalises(shape):
    case = cases.on_mesh(
        "x", cases.make_mesh(jax.devices()[:8], {"d": 8}), {"a": shape}, ("d", None)
    )
    gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x = gradient / np.linalg.norm(gradient, axis=(-2, -1), keepdims=True)
    if shape[-2] > shape[-1]:
        x = x.swapaxes(-1, -2)
    for _ in range(5):
        square = x @ x.swapaxes(-1, -2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    expected = x.swapaxes(-1, -2) if shape[-2] > shape[-1] else x
    tx = all_to_all_muon(1.0, case.shardings)
    params = {"a": jax.device_put(jnp.asarray(gradient), case.shardings["a"])}
    updates = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(params)
    np.testing.assert_allclose(-updates["a"], expected, atol=1e-4)
    kinds = sharding.measure(sharding.compile_step(case, tx)).collectives
    assert ("all-to-all" in kinds) == (len(shape) == 3)
