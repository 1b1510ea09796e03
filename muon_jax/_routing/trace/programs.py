"""Handlers of primitives that contain programs: loops, branches and `shard_map`."""

from typing import Any

from muon_jax._routing.trace.leaf_axes import blank
from muon_jax._routing.trace.tracer import Tracer
from muon_jax._routing.trace.values import Value, move, resized


def scan(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Runs the body on values without their first axis, so that this becomes a batch axis."""
    jaxpr = eqn.params["jaxpr"]
    body = getattr(jaxpr, "jaxpr", jaxpr)
    grown = [
        len(outer.aval.shape) > len(inner.aval.shape)
        for outer, inner in zip(eqn.invars, body.invars, strict=True)
    ]
    stacked = sum(
        len(outer.aval.shape) > len(inner.aval.shape)
        for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
    )
    carried = len(eqn.outvars) - stacked
    constants = len(values) - sum(grown) - carried
    xs = [_first_axis_off(value) for value in values[constants + carried :]]
    fixed = values[:constants]
    outputs = tracer.loop(
        lambda carry: tracer.run(jaxpr, [*fixed, *carry, *xs]),
        values[constants : constants + carried],
        eqn.outvars,
    )
    ys = [
        move(
            value._replace(uniform=frozenset(i + 1 for i in value.uniform)),
            lambda axes: (blank(eqn.params["length"]), *axes),
        )
        for value in outputs[carried:]
    ]
    return outputs[:carried] + ys


def _first_axis_off(value: Value) -> Value:
    uniform = frozenset(i - 1 for i in value.uniform if i)
    return move(value._replace(uniform=uniform), lambda axes: axes[1:])


def while_loop(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    before, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tests, constants = values[:before], values[before : before + fixed]

    def run(carry: list[Value]) -> list[Value]:
        tracer.run(eqn.params["cond_jaxpr"], [*tests, *carry])
        return tracer.run(eqn.params["body_jaxpr"], [*constants, *carry])

    return tracer.loop(run, values[before + fixed :], eqn.outvars)


def cond(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    index, *operands = values
    branches = [tracer.run(branch, operands) for branch in eqn.params["branches"]]
    joined = [
        tracer.join(list(outputs), var.aval.shape)
        for outputs, var in zip(zip(*branches, strict=True), eqn.outvars, strict=True)
    ]
    return [x if x.views else x._replace(data=x.data or index.data) for x in joined]


def shard_map(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Runs the body on shards, which have the same axes but smaller sizes."""
    body = eqn.params["jaxpr"]
    outputs = tracer.run(body, resized(values, getattr(body, "jaxpr", body).invars))
    return resized(outputs, eqn.outvars)
