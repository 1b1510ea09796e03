"""Names of JAX that may change or go with any release: those in use, and what serves instead."""

import ast
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import experimental, topology
from experiments.language import attention, mesh
from experiments.pretrain import experts, grouped

ROOT = Path(__file__).parent.parent
UNSTABLE = ("jax._src", "jax.experimental", "jax.extend", "jax.interpreters", "jax.lib")

# Each name of `jax.experimental` has a fallback, tested below. `jax.extend` and `jax.interpreters`
# are public, if without a promise of stability: a primitive can be made of nothing else.
IN_USE = {
    "experiments/experimental.py": {"jax.experimental"},
    "muon_jax/_sharding/match_sharding.py": {
        "jax.extend.core",
        "jax.extend.mlir.dialects",
        "jax.interpreters",
    },
    "tests/test_trace_routing.py": {"jax.experimental", "jax.experimental.custom_partitioning"},
    "tests/trajectories.py": {"jax.extend"},
}


def unstable_names(path):
    """Modules that a file imports, or names in its code or strings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.JoinedStr):
            names = [v.value for v in node.values if isinstance(v, ast.Constant)]
        found |= {n.rstrip(".") for n in names if n.startswith(UNSTABLE)}
    return found


def test_the_unstable_names_of_jax_are_these():
    folders = ("muon_jax", "experiments", "tests")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    found = {str(p.relative_to(ROOT)): unstable_names(p) for p in files}
    assert {path: names for path, names in found.items() if names} == IN_USE


def test_a_module_that_this_jax_lacks_is_none():
    assert experimental.optional_module("no.such.module") is None
    assert experimental.optional_module("topologies") is not None


def test_devices_in_their_order_without_mesh_utils(monkeypatch):
    usual = mesh.make_mesh((2, 2, 2, 2))
    monkeypatch.setattr(experimental, "_mesh_utils", None)
    np.testing.assert_array_equal(mesh.make_mesh((2, 2, 2, 2)).devices, usual.devices)


def test_compiling_for_a_topology_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(topology, "topologies", None)
    monkeypatch.setitem(__import__("sys").modules, "libtpu", SimpleNamespace())
    with pytest.raises(topology.TopologyError, match=r"no jax\.experimental\.topologies"):
        topology.topology_devices("v5e:4x4")


@pytest.fixture
def on_a_tpu_without_kernels(monkeypatch):
    tpu = SimpleNamespace(abstract_device=SimpleNamespace(platform="tpu"))
    monkeypatch.setattr(attention, "splash_attention", None)
    monkeypatch.setattr(grouped, "megablox", None)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: tpu)


def test_attention_in_blocks_without_the_splash_kernel(on_a_tpu_without_kernels):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 2, 8))
    mixed, largest = attention.causal_attention(q, k, v)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    assert largest.shape == (2,)


def test_ragged_products_without_megablox(on_a_tpu_without_kernels):
    ids = jax.random.randint(jax.random.key(1), (12, 2), 0, 3)
    x, gate, up = (
        jax.random.normal(jax.random.key(n), shape)
        for n, shape in enumerate([(12, 4), (3, 4, 5), (3, 4, 5)])
    )
    down = jax.random.normal(jax.random.key(4), (3, 5, 4))
    order = experts.sort_by_expert(ids, 3, 1)
    rows = experts.dispatch(x, order)
    found = experts.expert_ffn(rows, order, gate, up, down, expected=24)
    owner = jnp.sort(ids.ravel())
    hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", rows, gate[owner]))
    hidden *= jnp.einsum("rd,rdf->rf", rows, up[owner])
    np.testing.assert_allclose(found, jnp.einsum("rf,rfd->rd", hidden, down[owner]), atol=1e-4)


def test_ragged_products_of_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(grouped, "triton", None)
    x, kernels = jax.random.normal(jax.random.key(0), (256, 16)), jnp.ones((2, 16, 16))
    found = grouped.grouped_product(x, kernels, jnp.array([128, 128]), "gpu", expected=256)
    np.testing.assert_allclose(found, x @ kernels[0], atol=1e-5)
