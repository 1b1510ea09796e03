"""The table of handlers, which say what each primitive of JAX does to the leaves in its operands.

Primitives that are not in the table may operate on activations. If a leaf enters one, its name
decides.
"""

from typing import Any

from muon_jax._routing.trace.arrays import (
    broadcast,
    combine,
    dynamic_slice,
    each,
    elementwise,
    gather,
    gather_shards,
    moved,
    reduce,
    reshape_axes,
    resize_axes,
    sliced,
    sort,
    squeeze_axes,
    tile,
    transpose_axes,
    unstack,
)
from muon_jax._routing.trace.products import convolution, dot_general, ragged_dot_general
from muon_jax._routing.trace.programs import cond, scan, shard_map, while_loop
from muon_jax._routing.trace.tracer import Handler, Tracer
from muon_jax._routing.trace.values import Value


def _constant(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles positions and random numbers, which count as constants whatever their key."""
    return [Value(table=len(var.aval.shape) > 0) for var in eqn.outvars]


_ROWS: dict[Handler, str] = {
    elementwise: "abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type "
    "cbrt ceil clamp complex conj convert_element_type copy copy_p cos cosh digamma div eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma "
    "log log1p log2 logistic lt max min mul ne neg nextafter not one_minus_square or polygamma "
    "polynomial pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient "
    "sub tan tanh xor zeta bessel_i0e bessel_i1e population_count clz "
    "sharding_constraint layout_constraint reshard mesh_cast name",
    each: "optimization_barrier psum psum_invariant pmax pmin ppermute pvary pcast pbroadcast "
    "psum2 preduced vary_unreduced_cast device_put",
    sort: "sort",
    moved(transpose_axes): "transpose",
    moved(reshape_axes): "reshape",
    moved(squeeze_axes): "squeeze",
    sliced: "slice split",
    unstack: "unstack",
    moved(resize_axes): "pad fft all_to_all rev cumsum cumprod cummax cummin cumlogsumexp",
    tile: "tile",
    moved(gather_shards): "all_gather all_gather_invariant all_gather_reduced reduce_scatter "
    "unreduced_reduce_scatter",
    reduce: "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax "
    "argmin",
    combine: "concatenate stack dynamic_update_slice",
    broadcast: "broadcast_in_dim",
    gather: "gather",
    dynamic_slice: "dynamic_slice",
    dot_general: "dot_general",
    ragged_dot_general: "ragged_dot_general",
    convolution: "conv_general_dilated",
    scan: "scan",
    while_loop: "while",
    cond: "cond",
    shard_map: "shard_map",
    Tracer.unknown: "pallas_call",
    _constant: "iota random_bits random_seed random_wrap random_unwrap random_fold_in random_split "
    "threefry2x32 rng_bit_generator axis_index",
}

HANDLERS: dict[str, Handler] = {
    name: handler for handler, names in _ROWS.items() for name in names.split()
}
