"""The compiled functions of a language model's training, and the shardings of their arrays."""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.language import attention, guard, sharding
from experiments.language.processes import Share, place_whole

Metrics = dict[str, Any]


class Trainer(abc.ABC):
    """What trainers share; a study's own has the model and the gradient of a step.

    Params, optimizer state and accumulated gradients are float32, sharded as `sharding` says.

    Args:
        config: The settings, with `batch`, `accumulate`, `microbatch` and `clip`.
        mesh: The mesh, from `mesh.make_mesh`.
        rate: The config's learning rate after warm-up.
        params, specs: The shapes of the params, and their specs.
        begin: The argument of `_start`, as shapes.
        windows: The batch of a step, `(microbatches, B, ...)`, as shapes.
        shows_logits: Whether attention returns exact largest logits at no cost.
        **others: Specs of further parts of the state that are not replicated.

    Attributes:
        abstract, shardings: The state as shapes with shardings, and these shardings.
        abstract_windows, windows: The same for a step's batch.
        step: The jitted step, which computes attention logits only as the optimizer needs them.
        clips_at: The value up to which upper bounds of the largest attention logits suffice for the
            optimizer; None if it needs none.
        schedule: The schedule, a factor of the learning rates.

    Raises:
        ValueError: If the mesh does not divide an axis.
    """

    clips_at: float | None
    schedule: optax.Schedule

    def __init__(
        self,
        config: Any,
        mesh: jax.sharding.Mesh,
        *,
        rate: float,
        params: Any,
        specs: Any,
        begin: Any,
        windows: Any,
        shows_logits: bool,
        **others: Any,
    ):
        self.config, self.mesh, self.rate, self.specs = config, mesh, rate, specs
        self._shows_logits = shows_logits
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(self._start, begin)
        of_state = jax.tree.map(lambda x: jax.P(), shapes)._replace(
            params=specs, opt_state=sharding.state_specs(shapes.opt_state, params, specs), **others
        )
        self.shardings = sharding.shardings(of_state, mesh)
        self.windows = jax.NamedSharding(mesh, sharding.spec(None, "batch", None))
        self.abstract = sharding.placed(shapes, self.shardings)
        self.abstract_windows = jax.tree.map(lambda x: sharding.placed(x, self.windows), windows)
        self._whole = jax.NamedSharding(mesh, jax.P())
        self.step = self._jitted(look=shows_logits)

    @abc.abstractmethod
    def _start(self, begin: Any) -> Any:
        """Returns the state before the first step."""

    @abc.abstractmethod
    def _step(
        self, state: Any, windows: Any, rate: jax.Array, look: bool = False
    ) -> tuple[Any, Metrics]:
        """Returns the state after a step, and metrics; `look` is as for `advance`."""

    @abc.abstractmethod
    def transformation(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        """Returns the optimizer; `rate` is its learning rate after warm-up, and may be traced."""

    @functools.cached_property
    def share(self) -> Share:
        """The part of a step's batch that this process makes."""
        return Share(self.windows, self.config.accumulate, self.config.microbatch)

    @functools.cached_property
    def program(self) -> jax.stages.Compiled:
        """The compiled step, which is available before there is a state."""
        return self._compiled(self.step)

    @functools.cached_property
    def looking(self) -> jax.stages.Compiled:
        """The compiled step that also returns the exact largest attention logit.

        It is `program` itself if attention returns exact logits at no cost. Otherwise it is
        compiled when first needed; its updates are those of `program`.
        """
        return self.program if self._shows_logits else self._compiled(self._jitted(look=True))

    def _jitted(self, look: bool) -> Any:
        return jax.jit(
            functools.partial(self._step, look=look),
            in_shardings=(self.shardings, self.windows, self._whole),
            out_shardings=(self.shardings, self._whole),
            donate_argnums=0,
        )

    def _compiled(self, step: Any) -> jax.stages.Compiled:
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        with jax.set_mesh(self.mesh):
            return step.lower(self.abstract, self.abstract_windows, rate).compile()

    def advance(
        self, state: Any, windows: Any, rate: float | None = None, look: bool = True
    ) -> tuple[Any, Metrics]:
        """Runs one step, and donates `state`.

        Args:
            state: The state before the step.
            windows: The batch of the step, with the sharding `self.windows`.
            rate: A learning rate that replaces the config's, in the same program.
            look: Whether to return the exact `max_logit`, which may otherwise be NaN. This does not
                change the update.

        Returns:
            The new state, and metrics: arrays, or dicts of arrays.
        """
        program = self.looking if look else self.program
        given = np.float32(self.rate if rate is None else rate)
        return program(state, windows, place_whole(given, self._whole))

    def _threshold(self, look: bool) -> float | None:
        """Returns the value up to which upper bounds of largest logits suffice."""
        return None if look else self.clips_at

    def _updated(
        self,
        state: Any,
        loss: jax.Array,
        gradient: Any,
        rate: jax.Array,
        max_logits: dict[str, jax.Array],
        look: bool,
        spike: float | None = None,
    ) -> tuple[Any, Any, Metrics]:
        """Returns the state after a step, the updates even if the guard skips them, and metrics."""
        norm = optax.tree.norm(gradient)
        updates_before = state.step - state.guard.skipped
        taken, guarded = guard.judge(state.guard, updates_before, loss, norm, spike)
        clipping = jnp.minimum(1.0, self.config.clip / jnp.maximum(norm, 1e-30))
        clipped = jax.tree.map(lambda g: clipping * g, gradient)
        updates, opt_state = self.transformation(rate).update(
            clipped, state.opt_state, state.params, max_logits=max_logits
        )
        new = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = guard.choose(taken, new, (state.params, state.opt_state))
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate * self.schedule(updates_before),
            "max_logit": attention.largest_known(max_logits, self._threshold(look)),
            "taken": taken,
            "skipped": guarded.skipped,
            "nonfinite_in_a_row": guarded.in_a_row,
        }
        new = {"params": params, "opt_state": opt_state, "guard": guarded}
        return state._replace(step=state.step + 1, **new), updates, metrics


def sum_microbatches(
    microbatch: Callable[[Any], tuple[jax.Array, Any, Any]], windows: Any, zeros: Any
) -> tuple[Any, Any]:
    """Returns the sums of the microbatches' losses and gradients, and their stacked observations.

    Args:
        microbatch: The function `windows -> (loss, gradient, observed)` of one microbatch.
        windows: The batches of all microbatches.
        zeros: The initial sums of loss and gradient.
    """

    def add(sums: Any, windows: Any) -> tuple[Any, Any]:
        loss, gradient, observed = microbatch(windows)
        return jax.tree.map(jnp.add, sums, (loss, gradient)), observed

    return jax.lax.scan(add, zeros, windows)


def check_batch(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Checks that the mesh divides a microbatch."""
    ways = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    if config.microbatch % ways:
        raise ValueError(
            f"A microbatch has --batch {config.batch} / --accumulate {config.accumulate} = "
            f"{config.microbatch} sequences, which must be a multiple of the mesh axes data × "
            f"fsdp × expert = {ways}."
        )
