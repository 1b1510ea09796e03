"""A table of the routes of a tree, with the reason for each."""

import math
from typing import Any

from muon_jax._matrices.parts import split_into_parts
from muon_jax._routing.rules import LABELS, Route, Routing, route


def routing_table(params: Any, rules: Routing = None) -> str:
    """Returns a table of the label of each leaf, its matrices, and the reason.

    Its columns are path, shape, matrices, label and why. The matrices are those that are
    orthogonalised, as `batch × (fan_in × fan_out)`; if a leaf is split into parts of several
    sizes, each size is shown.

    Below the table are the number of parameters per label, and one line for each leaf that could be
    interpreted differently.

    Args:
        params, rules: As in `label_params`.

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
    """Formats the matrices of a leaf, each shape with its batch in front."""
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
