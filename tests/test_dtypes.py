"""An update has its gradient's dtype and a state's dtype never changes, whatever the options."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import DECAY, FACTORIES, RATE, draw, make
from variants import SCALE_BY

import muon_jax

OPTIONS = {
    "plain": lambda: {"weight_decay": 0.1},
    "arrays": lambda: {
        "learning_rate": jnp.asarray(0.02, jnp.float32),
        "weight_decay": np.float64(0.1),
        "mu_dtype": jnp.float32,
    },
    "schedules": lambda: {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "mu_dtype": jnp.bfloat16,
        "weight_decay_mask": {"mlp": True, "stack": False, "embed": True},
    },
}


def signature(tree):
    """With weak types: an array that becomes weak, or no longer is, is traced anew."""
    leaves = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


x64_and_dtype = pytest.mark.parametrize(
    # The "schedules" store bfloat16 beside float16: bfloat16 alone is promoted as float16 is.
    ("x64", "dtype"),
    [*itertools.product([False, True], [jnp.float32, jnp.float16])],
)


@x64_and_dtype
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", FACTORIES)
def test_dtypes_stay(name, option, x64, dtype):
    with jax.enable_x64(x64):
        options = OPTIONS[option]()
        if name in ("int8", "int4"):
            options.pop("mu_dtype", None)
        wrapped = optax.chain(
            optax.conditionally_transform(make(name, **options), lambda step: step % 2 == 0),
            optax.apply_if_finite(make(name, **options), 3),
        )
        params = jax.eval_shape(lambda: draw(dtype))
        state = jax.eval_shape(wrapped.init, params)
        updates, after = jax.eval_shape(wrapped.update, params, state, params)
        assert signature(updates) == signature(params)
        assert signature(after) == signature(state)


@x64_and_dtype
@pytest.mark.parametrize("name", SCALE_BY)
def test_dtypes_of_the_matrices_alone_stay(name, x64, dtype):
    with jax.enable_x64(x64):
        tx = SCALE_BY[name](**{} if name == "int8" else {"mu_dtype": jnp.float32})
        params = jax.eval_shape(lambda: {"stack": draw(dtype)["stack"]})
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert signature(updates) == signature(params)
        assert signature(after) == signature(state)


@pytest.mark.parametrize("rest", ["adamw", "sgd", "lion", "sign"])
def test_a_bfloat16_update_is_rounded_once(rest):
    """Of a leaf on the rest."""
    grads = [draw(jnp.bfloat16, seed)["mlp"]["bias"] for seed in (1, 2)]
    params = draw(jnp.bfloat16)["mlp"]["bias"]
    exact_params = params.astype(jnp.float32)
    settings = {"learning_rate": 0.0199, "weight_decay": 0.37, "other_optimizer": rest}
    settings |= {"mu_dtype": jnp.float32}
    settings |= {"adam_b1" if rest == "adamw" else "other_b1": 0.999}
    settings |= {"nu_dtype": jnp.float32} if rest == "adamw" else {}
    tx = make("muon", **settings)
    state, exact_state = tx.init({"bias": params}), tx.init({"bias": exact_params})
    for g in grads:
        ours, state = tx.update({"bias": g}, state, {"bias": params})
        exact, exact_state = tx.update(
            {"bias": g.astype(jnp.float32)}, exact_state, {"bias": exact_params}
        )
        assert ours["bias"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours["bias"], exact["bias"].astype(jnp.bfloat16))


def test_an_optimizer_of_the_users_own_ends_in_the_gradients_dtype_too():
    wide = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.astype("float32"), updates))
    tx, params = muon_jax.muon(0.1, other_optimizer=wide), draw(jnp.bfloat16)
    updates, _ = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
