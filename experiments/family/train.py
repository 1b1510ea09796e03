"""Trains cells: the steps between two evaluations are one compiled scan."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import muon_jax
from experiments import optimizers, schedules
from experiments.family import data
from experiments.family.config import Training
from experiments.family.model import LanguageModel
from experiments.language.cell import Metrics, train_in_memory
from experiments.optimizers import OptimizerName
from experiments.parallel import once

_EVALUATION_BATCH = 32


class State(NamedTuple):
    """The state that a training step updates."""

    params: Any
    opt_state: Any


class Model(NamedTuple):
    """The language model as functions of plain params, which all arms share.

    Attributes:
        start: A compiled function `seed -> params`.
        loss: A function `(params, windows) -> (mean loss, observed)`. `observed` are extra
            arguments of `tx.update` with values of the forward pass.
        evaluate: A compiled function `(params, windows) -> losses`, with one loss per window.
        routing: The params that Muon optimizes, traced from their use in `loss`.
        parameters: The number of parameters.
    """

    start: Callable
    loss: Callable
    evaluate: Callable
    routing: Any
    parameters: int


@once(keep=None)
def language_model(config: Training) -> Model:
    """Returns the configured model."""
    make = functools.partial(
        LanguageModel, width=config.width, layers=config.layers, head_size=config.head_size
    )
    abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graph, shapes, _ = nnx.split(abstract, nnx.Param, ...)

    def start(seed):
        return nnx.state(make(rngs=nnx.Rngs(params=jax.random.key(seed))), nnx.Param)

    def loss(params, windows):
        tokens = windows.astype(jnp.int32)
        logits, max_logits = nnx.merge(graph, params)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), {"max_logits": max_logits}

    def evaluate(params, windows):
        return jax.lax.map(
            lambda window: loss(params, window[None])[0], windows, batch_size=_EVALUATION_BATCH
        )

    window = jax.ShapeDtypeStruct((1, config.context + 1), jnp.uint8)
    return Model(
        jax.jit(start),
        loss,
        jax.jit(evaluate),
        muon_jax.trace_routing(loss, shapes, window),
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
    )


def transformation(
    config: Training, optimizer: OptimizerName, rate: float | jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer as a cell runs it: warm-up, then decay to zero."""
    schedule = schedules.warmup_then_decay(config.warmup, config.steps, config.decay)
    routing = language_model(config).routing
    return optimizers.build(optimizer, config, schedule, rate, routing=routing)


def start(config: Training, optimizer: OptimizerName, seed: int) -> State:
    """Returns the initial state of a training. The params depend only on the seed."""
    params = language_model(config).start(seed)
    return State(params, jax.jit(transformation(config, optimizer).init)(params))


@once(keep=None)
def compile_steps(
    config: Training, optimizer: OptimizerName, text_bytes: int, device: jax.Device | None
) -> Callable:
    """Compiles the steps between two evaluations, for all rates and seeds of an arm.

    Args:
        config: The settings of the model and the optimizers.
        optimizer: The optimizer.
        text_bytes: The length of the training text.
        device: The device to run on, JAX's default one while this is called.

    Returns:
        A function `(state, text, rate, seed, first step) -> (state, mean loss)`.
    """
    model = language_model(config)

    def advance(state, text, rate, seed, first):
        tx = transformation(config, optimizer, rate)

        def step(state, number):
            key = jax.random.fold_in(jax.random.key(seed), number)
            windows = data.batch(text, key, config.batch, config.context)
            (loss, observed), gradient = jax.value_and_grad(model.loss, has_aux=True)(
                state.params, windows
            )
            updates, opt_state = tx.update(gradient, state.opt_state, state.params, **observed)
            return State(optax.apply_updates(state.params, updates), opt_state), loss

        numbers = first + jnp.arange(config.steps // config.evaluations)
        state, losses = jax.lax.scan(step, state, numbers)
        return state, losses.mean()

    state = jax.eval_shape(lambda: start(config, optimizer, 0))
    number, rate = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    text = jax.ShapeDtypeStruct((text_bytes,), jnp.uint8)
    jitted = jax.jit(advance, donate_argnums=0)
    return jitted.lower(state, text, rate, number, number).compile()


def train_cell(
    config: Training,
    text: data.Data,
    optimizer: OptimizerName,
    rate: float,
    seed: int,
    on_evaluation: Callable[[Metrics], None] = lambda evaluation: None,
    device: jax.Device | None = None,
) -> tuple[list[Metrics], Metrics]:
    """Trains a cell with `train_in_memory`. Returns all evaluations and the outcome.

    Losses are in nats per byte. `device` is JAX's default device, for which programs are compiled.
    """
    compiled = compile_steps(config, optimizer, len(text.train), device)
    losses, eval_params = language_model(config).evaluate, optimizers.ARMS[optimizer].eval_params
    arguments = text.train, jnp.float32(rate), jnp.int32(seed)

    def advance(state: State, first: int, until: int) -> tuple[State, Metrics]:
        state, loss = jax.block_until_ready(compiled(state, *arguments, jnp.int32(first)))
        return state, {"train_loss": float(loss)}

    def evaluate(state: State) -> Metrics:
        params = eval_params(state.opt_state, state.params)
        found = np.asarray(losses(params, text.validation), np.float64)
        return {"validation_loss": float(found.mean())}

    every, begin = config.steps // config.evaluations, start(config, optimizer, seed)
    trained = train_in_memory(begin, config.steps, every, advance, evaluate, on_evaluation)
    return trained.history, trained.outcome
