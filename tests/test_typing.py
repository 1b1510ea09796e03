"""The package is typed: its public signatures, and a user's program under `mypy --strict`."""

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import muon_jax

ROOT = Path(__file__).parent.parent

PROGRAM = """
import jax
import jax.numpy as jnp
import optax

import muon_jax

params: dict[str, jax.Array] = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 4))}
tx: optax.GradientTransformation = optax.chain(
    optax.clip_by_global_norm(1.0), muon_jax.muon(0.02, weight_decay=0.1, routing=[("w1", "muon")])
)
state = tx.init(params)
updates, state = tx.update(params, state, params)
factor: jax.Array = muon_jax.newton_schulz(params["w1"], coeffs="you", dtype=jnp.bfloat16)
table: str = muon_jax.routing_table(params)
wrong = muon_jax.newton_schulz(params["w1"], steps="3")  # type: ignore[arg-type]
tx = muon_jax.muon(0.02, weight_decai=0.1)  # type: ignore[call-arg]
tx = muon_jax.muon(0.02, chunk_size="4")  # type: ignore[arg-type]
tx = muon_jax.normuon(0.02, nesterov="no")  # type: ignore[arg-type]
tx = muon_jax.hybrid(muon_jax.scale_by_muon, 0.02, mesh="data")  # type: ignore[arg-type]
tx = muon_jax.dion(0.02, adam_b2="0.95")  # type: ignore[arg-type]
"""


@pytest.mark.parametrize("name", muon_jax.__all__)
def test_options_that_are_passed_on_have_the_types_of_the_signature(name):
    """What type checkers read of `**options`, and what `help` and `inject_hyperparams` read."""
    function = inspect.unwrap(getattr(muon_jax, name))
    shown = {
        key: parameter.annotation
        for key, parameter in inspect.signature(getattr(muon_jax, name)).parameters.items()
    }
    for parameter in inspect.signature(function).parameters.values():
        if typing.get_origin(parameter.annotation) is typing.Unpack:
            [options] = typing.get_args(parameter.annotation)
            own = set(inspect.signature(function).parameters)
            passed_on = {key: kind for key, kind in shown.items() if key not in own}
            assert typing.get_type_hints(options) == passed_on


@pytest.mark.parametrize("name", muon_jax.__all__)
def test_public_signatures_are_annotated(name):
    public = getattr(muon_jax, name)
    functions = [public]
    if inspect.isclass(public):
        members = vars(public).items()
        functions = [f for key, f in members if inspect.isfunction(f) and not key.startswith("_")]
    for function in functions:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        for parameter in signature.parameters.values():
            assert parameter.name == "self" or parameter.annotation is not parameter.empty, function


def test_a_users_program_passes_mypy_strict(tmp_path, pytestconfig):
    """Under which an ignored error that is none is one."""
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--strict", "--ignore-missing-imports", "--follow-imports=silent"]
    options += ["--cache-dir", pytestconfig.cache.mkdir("mypy")]  # which also knows JAX
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "program.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "muon_jax" / "py.typed").exists()
