"""The table of handlers, which say what each primitive of JAX does to the leaves in its operands.

Primitives that are not in the table may operate on activations. If a leaf enters one, its name
decides.
"""

from typing import Any

from muon_jax._routing.trace import arrays, products, programs
from muon_jax._routing.trace.tracer import Handler, Tracer
from muon_jax._routing.trace.values import Value


def _constant(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles positions and random numbers, which count as constants whatever their key."""
    return [Value(table=len(var.aval.shape) > 0) for var in eqn.outvars]


_ROWS: dict[Handler, str] = {
    arrays.elementwise: "abs acos acosh add add_any and asin asinh atan atan2 atanh "
    "bitcast_convert_type "
    "cbrt ceil clamp complex conj convert_element_type copy copy_p cos cosh digamma div eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma "
    "log log1p log2 logistic lt max min mul ne neg nextafter not one_minus_square or polygamma "
    "polynomial pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient "
    "sub tan tanh xor zeta bessel_i0e bessel_i1e population_count clz "
    "sharding_constraint layout_constraint reshard mesh_cast name",
    arrays.each: "optimization_barrier psum psum_invariant pmax pmin ppermute pvary pcast "
    "pbroadcast psum2 preduced vary_unreduced_cast device_put",
    arrays.sort: "sort",
    arrays.transpose_axes: "transpose",
    arrays.reshape_axes: "reshape",
    arrays.squeeze_axes: "squeeze",
    arrays.sliced: "slice split",
    arrays.unstack: "unstack",
    arrays.resize_axes: "pad fft all_to_all rev cumsum cumprod cummax cummin cumlogsumexp",
    arrays.tile: "tile",
    arrays.gather_shards: "all_gather all_gather_invariant all_gather_reduced reduce_scatter "
    "unreduced_reduce_scatter",
    arrays.reduce: "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
    "argmax argmin",
    arrays.combine: "concatenate stack dynamic_update_slice",
    arrays.broadcast: "broadcast_in_dim",
    arrays.gather: "gather",
    arrays.dynamic_slice: "dynamic_slice",
    products.dot_general: "dot_general",
    products.ragged_dot_general: "ragged_dot_general",
    products.convolution: "conv_general_dilated",
    programs.scan: "scan",
    programs.while_loop: "while",
    programs.cond: "cond",
    programs.shard_map: "shard_map",
    Tracer.unknown: "pallas_call",
    _constant: "iota random_bits random_seed random_wrap random_unwrap random_fold_in random_split "
    "threefry2x32 rng_bit_generator axis_index",
}

HANDLERS: dict[str, Handler] = {
    name: handler for handler, names in _ROWS.items() for name in names.split()
}
