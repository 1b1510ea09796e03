"""The routes of a tree as a table of text, with the reason for each."""

import math
from typing import Any

from muon_jax._matrices.parts import split_into_parts
from muon_jax._routing.rules import LABELS, Route, Routing, route


def routing_table(params: Any, rules: Routing = None) -> str:
    """`label_params` as text: path, shape, batch × (fan_in × fan_out), label, and why.

    The matrices are those that are orthogonalised: a leaf in equal parts shows how many and of
    which shape, and one in parts of several sizes shows each size.

    Ends with the number of parameters per label, and with one line for each shape that could be
    read in another way.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> print(muon_jax.routing_table({"mlp": {"kernel": jnp.ones((8, 32))}}))
        path        shape    matrices  label  why
        mlp/kernel  (8, 32)  8 × 32    muon   a kernel (fan_in, fan_out)
        <BLANKLINE>
        muon: 1 leaf, 256 parameters (100.0 %)
    """
    routes = list(route(params, rules).values())
    rows = [("path", "shape", "matrices", "label", "why")]
    for leaf in routes:
        rows.append((leaf.path or "(root)", str(leaf.shape), _matrices(leaf), leaf.label, leaf.why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = sum(math.prod(leaf.shape) for leaf in routes)
    lines.append("")
    for label in LABELS:
        sizes = [math.prod(leaf.shape) for leaf in routes if leaf.label == label]
        if sizes:
            share = 100 * sum(sizes) / max(total, 1)
            leaves = "leaf" if len(sizes) == 1 else "leaves"
            lines.append(
                f"{label}: {len(sizes)} {leaves}, {sum(sizes):,} parameters ({share:.1f} %)"
            )
    lines += [
        f"ambiguous: {leaf.path or '(root)'} {leaf.shape}: {leaf.doubt}"
        for leaf in routes
        if leaf.doubt
    ]
    return "\n".join(lines)


def _matrices(leaf: Route) -> str:
    """Matrices of each shape, with their batch in front."""
    if leaf.axes is None:
        return "-"
    parts = split_into_parts(leaf.shape, leaf.axes)
    shown = []
    for part in parts:
        batch, fan_in, fan_out = part.axes.matrix_shape(part.shape)
        stack = "".join(f"{size} × " for size in batch)
        matrix = f"{fan_in} × {fan_out}"
        shown.append(f"{stack}({matrix})" if stack or len(parts) > 1 else matrix)
    return " + ".join(shown)
