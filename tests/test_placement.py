"""On any mesh the update equals that of one device, and every matrix is orthogonalised once."""

import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import TOLERANCE, every_kind, leading, lies_like, mesh_of, place, trailing
from orbax.checkpoint import v1 as ocp
from trajectories import relative_error

import muon_jax


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def layers(count, stacked, width=16, hidden=32):
    """Kernels of `count` layers as one stack each, or as separate leaves."""
    shapes = {"query": (width, width), "out": (width, width)}
    shapes |= {"up": (width, hidden), "down": (hidden, width)}
    if stacked:
        return {name: {"kernel": normal((count, *s), 1)} for name, s in shapes.items()}
    return {
        f"layer_{i}": {name: {"kernel": normal(s, i)} for name, s in shapes.items()}
        for i in range(count)
    }


def wide_out(x):
    """The long side over `tp`, the short one over `fsdp`."""
    return trailing("fsdp", "tp")(x) if x.shape[-1] >= x.shape[-2] else trailing("tp", "fsdp")(x)


LINE, PLANE, CUBE = {"fsdp": 8}, {"fsdp": 4, "tp": 2}, {"data": 2, "fsdp": 2, "tp": 2}
EXPERTS = {"experts": {"up": normal((8, 3, 16, 32)), "down": normal((8, 3, 32, 16))}}
TURNED = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), EXPERTS)
HEADS = {"query": {"kernel": normal((3, 16, 4, 8))}, "out": {"kernel": normal((3, 4, 8, 16))}}

CASES = {
    "fsdp, stacked": (LINE, layers(8, True), trailing("fsdp", None)),
    "fsdp, separate": (LINE, layers(4, False), trailing("fsdp", None)),
    "fsdp, fan_out": (LINE, layers(8, True), trailing(None, "fsdp")),
    "fsdp, fewer matrices than devices": (LINE, layers(1, True), trailing("fsdp", None)),
    "fsdp, a remainder": (LINE, layers(11, True), trailing("fsdp", None)),
    "replicated": (LINE, layers(3, True), leading()),
    "replicated, one matrix": (LINE, {"kernel": normal((24, 40))}, leading()),
    "odd sizes": (LINE, {"kernel": normal((3, 7, 11))}, leading()),
    "layers over the mesh": (LINE, layers(8, True), leading("fsdp")),
    "fsdp × tp": (PLANE, layers(8, True), trailing("fsdp", "tp")),
    "fsdp × tp, long over tp": (PLANE, layers(3, True), wide_out),
    "both axes on fan_in": (PLANE, layers(8, True), trailing(("fsdp", "tp"), None)),
    "fsdp alone": (PLANE, layers(8, True), trailing("fsdp", None)),
    "tp alone": (PLANE, layers(8, True), trailing(None, "tp")),
    "data × fsdp × tp": (CUBE, layers(8, True), trailing("fsdp", "tp")),
    "data × fsdp × tp, a remainder": (CUBE, layers(3, True), trailing("tp", "fsdp")),
    "experts first, over all": (PLANE, EXPERTS, leading(("fsdp", "tp"))),
    "experts second, over all": (PLANE, TURNED, leading(None, ("fsdp", "tp"))),
    "experts over one axis, fan_in over another": (PLANE, EXPERTS, leading("fsdp", None, "tp")),
    "heads over tp": (
        PLANE,
        HEADS,
        lambda x: P(None, "fsdp", "tp") if x.shape[1] == 16 else P(None, "tp", None, "fsdp"),
    ),
}


PARTLY_REPLICATED = {
    case
    for case, (sizes, params, specs) in CASES.items()
    if any(
        len([*filter(None, jax.tree.leaves(tuple(specs(x))))]) < len(sizes)
        for x in jax.tree.leaves(params)
    )
}


def alone(params, tx=None, **settings):
    """The update on one device, of Muon by default."""
    tx = tx or muon_jax.muon(0.02, **settings)
    g = jax.tree.map(jnp.asarray, params)
    return jax.jit(tx.update)(g, tx.init(g), g)[0]


def spread(params, specs, mesh, told=False, **settings):
    """The updates on a mesh, and the shardings that they should have."""
    placed, shardings = place(params, specs, mesh)
    told = {"shardings": shardings} if told else {}
    tx = muon_jax.muon(0.02, mesh=mesh, **told, **settings)
    return jax.jit(tx.update)(placed, tx.init(placed), placed), shardings


def assert_alike(case, kind, told=False, **settings):
    """The update on a mesh is that of one device."""
    sizes, params, specs = CASES[case]
    (updates, _), _ = spread(params, specs, mesh_of(kind, **sizes), told, **settings)
    assert relative_error(updates, alone(params, **settings)) < TOLERANCE


@every_kind
@pytest.mark.parametrize("case", CASES)
def test_the_update_equals_that_of_one_device_and_lies_like_its_parameter(case, kind):
    sizes, params, specs = CASES[case]
    (updates, state), shardings = spread(params, specs, mesh_of(kind, **sizes))
    assert relative_error(updates, alone(params)) < TOLERANCE

    def lies(x, sharding):
        assert lies_like(x, sharding), (x.sharding, sharding)

    # Under Auto axes XLA may split an output over axes that its parameter leaves unused.
    if kind == "Explicit" or case not in PARTLY_REPLICATED:
        jax.tree.map(lies, updates, shardings)
        jax.tree.map(lies, state.inner_states["muon"].inner_state[0].mu, shardings)


@pytest.mark.parametrize("case", ["fsdp × tp", "experts over one axis, fan_in over another"])
def test_shardings_may_be_told_under_auto_axes(case):
    assert_alike(case, "Auto", told=True)


@every_kind
@pytest.mark.parametrize("idle", [{}, {"expert": 1}], ids=["", "an axis of one device"])
@pytest.mark.parametrize("case", ["fsdp, a remainder", "fsdp × tp, long over tp"])
def test_bfloat16_crosses_the_network_and_keeps_its_error(case, idle, kind):
    """Both round to bfloat16 at other moments: each is as far from float32 as the other."""
    sizes, params, specs = CASES[case]
    exact, half = alone(params), alone(params, ns_dtype=jnp.bfloat16)
    mesh = mesh_of(kind, **sizes, **idle)
    (updates, _), _ = spread(params, specs, mesh, ns_dtype=jnp.bfloat16)
    assert relative_error(updates, exact) < 1.5 * relative_error(half, exact)


@every_kind
@pytest.mark.parametrize("how", ["set_mesh", "of the arrays", "eager"])
def test_the_mesh_is_found(how, kind):
    sizes, params, specs = CASES["fsdp, a remainder"]
    mesh = mesh_of(kind, **sizes)
    placed, _ = place(params, specs, mesh)
    tx = muon_jax.muon(0.02)
    update = tx.update if how == "eager" else jax.jit(tx.update)
    if how == "set_mesh":
        with jax.set_mesh(mesh):
            updates, _ = update(placed, tx.init(placed), placed)
    else:
        updates, _ = update(placed, tx.init(placed), placed)
    assert relative_error(updates, alone(params)) < TOLERANCE
    if how != "eager":
        text = update.lower(placed, tx.init(placed), placed).compile().as_text()
        assert "all-to-all" in text and "all-gather" not in text


@pytest.mark.parametrize("case", ["fsdp, stacked", "fsdp, a remainder", "experts first, over all"])
@every_kind
def test_chunks_change_nothing(case, kind):
    _, params, _ = CASES[case]
    assert_alike(case, kind, chunk_size=1)
    assert relative_error(alone(params, chunk_size=1), alone(params)) < TOLERANCE


def by_fan_in(x):
    """Tells fan_in from fan_out, and a matrix from a part of one."""
    return x / jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))


@every_kind
@pytest.mark.parametrize("case", ["fsdp, fan_out", "fsdp, a remainder", "fsdp × tp, long over tp"])
def test_any_orthogonalizer_sees_whole_matrices_as_they_are(case, kind):
    assert_alike(case, kind, orthogonalizer=by_fan_in)


@every_kind
@pytest.mark.parametrize("case", ["fsdp, a remainder", "replicated"])
def test_a_matrix_touches_no_other(case, kind):
    """NaN, zeros and huge numbers stay in their own matrix, cut or not."""
    sizes, params, specs = CASES[case]
    hurt = jax.tree.map(np.copy, params)
    hurt["up"]["kernel"][0, 3, 3] = np.nan
    hurt["down"]["kernel"][-1] = 0
    hurt["query"]["kernel"][-1] *= 1e30
    (updates, _), _ = spread(hurt, specs, mesh_of(kind, **sizes))
    expected = alone(params)
    assert np.isnan(updates["up"]["kernel"][0]).all()
    assert not np.asarray(updates["down"]["kernel"][-1]).any()
    assert relative_error(updates["up"]["kernel"][1:], expected["up"]["kernel"][1:]) < TOLERANCE
    assert relative_error(updates["down"]["kernel"][:-1], expected["down"]["kernel"][:-1]) < 1e-5
    assert relative_error(updates["query"], expected["query"]) < TOLERANCE


@every_kind
def test_float16_gradients_do_not_overflow_on_the_way(kind):
    params = jax.tree.map(lambda x: (x * 1e4).astype(np.float16), layers(3, True))
    (updates, _), _ = spread(params, trailing("fsdp", None), mesh_of(kind, **LINE))
    assert relative_error(updates, alone(params)) < 2e-2
    settings = {"ns_dtype": jnp.float16}
    params = jax.tree.map(lambda x: x * 1e20, layers(3, True))
    (updates, _), _ = spread(params, trailing("fsdp", None), mesh_of(kind, **LINE), **settings)
    assert relative_error(updates, alone(params, **settings)) < 2e-2


# --- Inside shard_map ------------------------------------------------------------------------


def inside(params, specs, mesh, axis_names=None, **settings):
    placed, _ = place(params, specs, mesh)
    tx = muon_jax.scale_by_muon(**settings)
    spec = jax.tree.map(specs, params)

    def update(g):
        return tx.update(g, tx.init(g))[0]

    mapped = jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(spec,),
        out_specs=spec,
        axis_names=axis_names or set(mesh.axis_names),
        check_vma=False,
    )
    return jax.jit(mapped)(placed)


def alone_unscaled(params):
    return alone(params, muon_jax.scale_by_muon())


@every_kind
@pytest.mark.parametrize("specs", [leading("fsdp"), leading()], ids=["layers", "replicated"])
def test_inside_shard_map_leaves_are_whole(specs, kind):
    params = layers(8, True)
    updates = inside(params, specs, mesh_of(kind, **LINE))
    assert relative_error(updates, alone_unscaled(params)) < TOLERANCE


@every_kind
@pytest.mark.parametrize("count", [8, 3])
def test_inside_shard_map_shardings_tell_of_parts(count, kind):
    params, specs = layers(count, True), trailing("fsdp", "tp")
    told = jax.tree.map(specs, params)
    updates = inside(params, specs, mesh_of(kind, **PLANE), shardings=told)
    assert relative_error(updates, alone_unscaled(params)) < TOLERANCE


@every_kind
def test_inside_shard_map_over_some_axes_the_others_are_used(kind):
    params, mesh = layers(8, True), mesh_of(kind, **PLANE)
    updates = inside(params, leading("fsdp"), mesh, axis_names={"fsdp"})
    assert relative_error(updates, alone_unscaled(params)) < TOLERANCE


# --- Errors ----------------------------------------------------------------------------------


def test_a_mesh_that_is_not_the_contexts_is_refused():
    tx = muon_jax.muon(0.02, mesh=mesh_of("Auto", **LINE))
    params = {"kernel": jnp.ones((8, 8))}
    with (
        jax.set_mesh(mesh_of("Auto", **PLANE)),
        pytest.raises(ValueError, match=r"mesh= has the axes \{'fsdp': 8\}, but the context"),
    ):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("fsdp"), r"splits axis 0 of 'mlp/kernel', of size 6, over the mesh axes \('fsdp',\) of"),
        (P(None, None, "tp"), "shardings= has 3 axes for 'mlp/kernel', which has 2"),
        (P(None, "nowhere"), "names the mesh axis 'nowhere'"),
        (P("tp", "tp"), "uses a mesh axis twice for 'mlp/kernel'"),
        ("fsdp", "must have NamedSharding or PartitionSpec .*; got 'fsdp' at 'mlp/kernel'"),
    ],
)
def test_shardings_that_do_not_fit_are_refused(spec, message):
    params = {"mlp": {"kernel": jnp.ones((6, 8))}}
    shardings = {"mlp": {"kernel": spec}}
    tx = muon_jax.muon(0.02, mesh=mesh_of("Auto", **PLANE), shardings=shardings)
    with pytest.raises((ValueError, TypeError), match=message):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5])
def test_a_chunk_holds_at_least_one_matrix(chunk_size):
    with pytest.raises((TypeError, ValueError), match="chunk_size must be an integer"):
        muon_jax.muon(0.02, chunk_size=chunk_size)


# --- Processes and checkpoints ---------------------------------------------------------------

WORKER = """
    import sys
    import jax
    import numpy as np
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    rank, address, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    import muon_jax
    from jax.sharding import NamedSharding, PartitionSpec as P

    mesh = jax.make_mesh((4,), ("fsdp",))
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    def draw(shape, seed):
        x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        return jax.make_array_from_callback(shape, sharding, lambda index: x[index])
    params = {"up": {"kernel": draw((5, 16, 32), 0)}, "out": {"kernel": draw((5, 16, 16), 1)}}
    tx = muon_jax.muon(0.02)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(updates)
    if rank == 0:
        np.savez(out, up=whole["up"]["kernel"], out=whole["out"]["kernel"])
"""


@pytest.mark.slow
def test_two_processes_give_the_update_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), address, str(tmp_path / "updates.npz")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(logs)
    found = np.load(tmp_path / "updates.npz")
    params = {"up": {"kernel": normal((5, 16, 32), 0)}, "out": {"kernel": normal((5, 16, 16), 1)}}
    expected = alone(params)
    assert relative_error(found["up"], expected["up"]["kernel"]) < TOLERANCE
    assert relative_error(found["out"], expected["out"]["kernel"]) < TOLERANCE


@pytest.mark.parametrize("after", [LINE, {"fsdp": 2, "tp": 2}, {"fsdp": 1}])
def test_a_checkpoint_of_one_mesh_goes_on_under_another(after, tmp_path):
    params = layers(3, True)
    tx = muon_jax.muon(0.02)

    def begin(sizes, specs):
        mesh = mesh_of("Explicit", **sizes)
        placed, _ = place(params, specs, mesh)
        with jax.set_mesh(mesh):
            return placed, jax.jit(tx.init)(placed)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    specs = trailing("fsdp", "tp")
    placed, state = step(*begin(PLANE, specs))
    ocp.save(tmp_path / "run", (placed, state))
    fewer = specs if "tp" in after else trailing("fsdp", None)
    restored = ocp.load(tmp_path / "run", begin(after, fewer))
    jax.tree.map(np.testing.assert_array_equal, restored, (placed, state))
    assert relative_error(step(*restored)[0], step(placed, state)[0]) < TOLERANCE
