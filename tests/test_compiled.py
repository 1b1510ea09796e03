"""`experiments.compiled` on programs whose FLOPs and exchanged bytes are known."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import devices_of

from experiments.bench.cases import make_mesh
from experiments.compiled import Collective, Program, UnreadableProductError, measure, read
from experiments.trips import UnreadableLoopError

DEVICES = 8
FLOAT = 4  # bytes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def measured(function, *arguments) -> Program:
    return measure(jax.jit(function).lower(*arguments).compile())


def repeat(function, times):
    return lambda x: jax.lax.fori_loop(0, times, lambda _, y: function(y), x)


def square(x):
    return x @ x


def scanned(x):
    return jax.lax.scan(lambda carry, _: (carry @ carry, carry.sum()), x, length=6)[0]


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (jnp.matmul, [(64, 96), (96, 32)], 2 * 64 * 96 * 32),
        (jnp.matmul, [(5, 64, 96), (5, 96, 32)], 5 * 2 * 64 * 96 * 32),
        (lambda x: x @ x.T, [(16, 96)], 2 * 16 * 96 * 16),
        (functools.partial(jnp.einsum, "abc,bcd->ad"), [(8, 16, 24), (16, 24, 40)], 2 * 122880),
        (lambda x: jnp.sin(x) + 1, [(64, 64)], 0),
    ],
)
def test_flops_equal_those_of_xla(function, shapes, flops):
    compiled = jax.jit(function).lower(*(array(*shape) for shape in shapes)).compile()
    assert measure(compiled).flops == flops
    if flops:
        assert compiled.cost_analysis()["flops"] == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (repeat(square, 5), 5),
        (scanned, 6),
        (repeat(lambda x: repeat(square, 4)(x) @ x, 3), 15),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, square, x), 2),
        (lambda x: jax.lax.switch(2, [square, jnp.sin, lambda x: x @ x @ x @ x], x), 3),
    ],
    ids=["loop", "scan", "nested", "cond", "known branch"],
)
def test_loops_count_their_trips_and_conditionals_their_dearest_branch(function, products):
    assert measured(function, array(64, 64)).flops == products * 2 * 64**3


def counted(start, goes_on, step):
    """As many products as a loop whose index has this start, condition and step has trips."""
    return lambda x: jax.lax.while_loop(
        lambda c: goes_on(c[0]), lambda c: (step(c[0]), square(c[1])), (start, x)
    )[1]


def nested(x):
    """Five times an inner loop from 2 that counts by 3 below 12: 2, 5, 8, 11."""
    inner = counted(2, lambda i: i < 12, lambda i: i + 3)
    return counted(9, lambda i: i >= 5, lambda i: i - 1)(inner(x)) + repeat(inner, 5)(x)


LOOPS = {
    "from 3": (counted(3, lambda i: i < 11, lambda i: i + 1), 8),
    "by 2": (counted(0, lambda i: i < 8, lambda i: i + 2), 4),
    "by 2 from 3, past the bound": (counted(3, lambda i: i < 10, lambda i: i + 2), 4),
    "down": (counted(11, lambda i: i > 2, lambda i: i - 2), 5),
    "up to and with": (counted(0, lambda i: i <= 6, lambda i: i + 1), 7),
    "unequal": (counted(0, lambda i: i != 6, lambda i: i + 3), 2),
    "doubling": (counted(1, lambda i: i < 100, lambda i: i * 2), 7),
    "past the largest": (counted(2**31 - 2, lambda i: i > 0, lambda i: i + 1), 2),
    "never": (counted(5, lambda i: i < 5, lambda i: i + 1), 0),
    "nested": (nested, 4 + 5 + 5 * 4),
}


@pytest.mark.parametrize("told", [True, False], ids=["trips told", "trips read"])
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_have_the_trips_that_their_index_counts(loop, told):
    function, trips = LOOPS[loop]
    text = jax.jit(function).lower(array(64, 64)).compile().as_text()
    if not told:  # as TPUs' programs are
        text = re.sub(r'"known_\w+":\{[^}]*\},?', "", text)
        assert "known_trip_count" not in text
    assert read(text).flops == trips * 2 * 64**3


@pytest.mark.parametrize(
    ("start", "goes_on"),
    [(0, lambda x, i: x.sum() < 3), (None, lambda x, i: i < 5)],
    ids=["an end by data", "a start by an argument"],
)
def test_a_loop_whose_trips_depend_on_data_is_refused(start, goes_on):
    def loop(x, n):
        begin = n if start is None else start
        return jax.lax.while_loop(lambda c: goes_on(*c), lambda c: (c[0] @ x, c[1] + 1), (x, begin))

    with pytest.raises(UnreadableLoopError, match="its end depends on data, or its start, step"):
        measured(loop, array(64, 64), array(dtype=jnp.int32))


BOUND_OUTSIDE = """HloModule outside

%step (s: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {
  %s = (s32[], s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %x = f32[4,4]{1,0} get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], s32[], f32[4,4]) tuple(%next, %n, %y)
}

%below (r: (s32[], s32[], f32[4,4])) -> pred[] {
  %r = (s32[], s32[], f32[4,4]) parameter(0)
  %j = s32[] get-tuple-element(%r), index=0
  %m = s32[] get-tuple-element(%r), index=1
  ROOT %more = pred[] compare(%j, %m), direction=LT
}

%outer (o: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {
  %o = (s32[], s32[], f32[4,4]) parameter(0)
  %k = s32[] get-tuple-element(%o), index=0
  %bound = s32[] get-tuple-element(%o), index=1
  %z = f32[4,4]{1,0} get-tuple-element(%o), index=2
  %zero = s32[] constant(0)
  %begin = (s32[], s32[], f32[4,4]) tuple(%zero, %bound, %z)
  %inner = (s32[], s32[], f32[4,4]) while(%begin), condition=%below, body=%step
  %w = f32[4,4]{1,0} get-tuple-element(%inner), index=2
  %by = s32[] constant(2)
  %later = s32[] add(%k, %by)
  ROOT %u = (s32[], s32[], f32[4,4]) tuple(%later, %bound, %w)
}

%below.1 (q: (s32[], s32[], f32[4,4])) -> pred[] {
  %q = (s32[], s32[], f32[4,4]) parameter(0)
  %l = s32[] get-tuple-element(%q), index=0
  %p = s32[] get-tuple-element(%q), index=1
  ROOT %on = pred[] compare(%l, %p), direction=LT
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %from = s32[] constant(0)
  %to = s32[] constant(5)
  %first = (s32[], s32[], f32[4,4]) tuple(%from, %to, %a)
  %all = (s32[], s32[], f32[4,4]) while(%first), condition=%below.1, body=%outer
  ROOT %result = f32[4,4]{1,0} get-tuple-element(%all), index=2
}
"""


def test_the_bound_of_a_loop_may_come_from_outside_of_the_loop_around_it():
    assert read(BOUND_OUTSIDE).flops == 3 * 5 * 2 * 4**3
    changed = BOUND_OUTSIDE.replace("tuple(%later, %bound,", "tuple(%later, %later,")
    with pytest.raises(UnreadableLoopError, match="%inner"):
        read(changed)


def exchange(function, out_spec) -> dict[str, Collective]:
    """Of a (64, 32) float32 array whose fan_in is spread over the devices."""
    mesh = make_mesh(jax.devices(), {"d": DEVICES})
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=P("d"), out_specs=out_spec, check_vma=False
    )
    return measured(sharded, array(64, 32)).collectives


WHOLE = 64 * 32 * FLOAT
SHARD = WHOLE // DEVICES


@pytest.mark.parametrize(
    ("function", "out_spec", "expected"),
    [
        (
            lambda x: jax.lax.all_gather(x, "d", tiled=True),
            P(),
            {"all-gather": Collective(1, 0, WHOLE, SHARD)},
        ),
        (lambda x: jax.lax.psum(x, "d"), P(), {"all-reduce": Collective(1, 0, SHARD, SHARD)}),
        (
            lambda x: jax.lax.psum_scatter(x, "d", tiled=True),
            P("d"),
            {"reduce-scatter": Collective(1, 0, SHARD // DEVICES, SHARD)},
        ),
        (
            lambda x: jax.lax.all_to_all(x, "d", 1, 0, tiled=True),
            P(None, "d"),
            {"all-to-all": Collective(1, 0, SHARD, SHARD)},
        ),
        (
            lambda x: jax.lax.ppermute(x, "d", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]),
            P("d"),
            {"collective-permute": Collective(1, 0, SHARD, SHARD)},
        ),
        (
            repeat(lambda x: 0.5 * jax.lax.psum(x, "d"), 3),
            P("d"),
            {"all-reduce": Collective(3, 3, 3 * SHARD, 3 * SHARD)},
        ),
        (jnp.sin, P("d"), {}),
    ],
    ids=["all-gather", "psum", "psum-scatter", "all-to-all", "permute", "in a loop", "none"],
)
def test_collectives_have_exact_bytes(function, out_spec, expected):
    assert exchange(function, out_spec) == expected


def test_sums_over_kinds():
    program = Program(
        0, {"all-gather": Collective(2, 1, 100, 10), "all-to-all": Collective(3, 3, 20, 20)}
    )
    assert (program.exchanged_bytes, program.in_loops) == (120, 4)


def test_memory_is_of_one_device():
    mesh = make_mesh(jax.devices(), {"d": DEVICES})
    sharding = NamedSharding(mesh, P("d"))
    step = jax.jit(lambda x: jnp.fft.fft(x).real, in_shardings=sharding, out_shardings=sharding)
    program = measure(step.lower(array(64, 32)).compile())
    assert (program.argument_bytes, program.output_bytes) == (SHARD, SHARD)
    assert program.temp_bytes >= SHARD  # the spectrum is complex


ASYNCHRONOUS = """HloModule pairs

%send (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-to-all.1 = f32[8]{0} all-to-all(%p), channel_id=2, dimensions={0}
}

%first (p.1: f32[8]) -> f32[16] {
  %p.1 = f32[8]{0:T(128)} parameter(0)
  ROOT %all-gather.1 = f32[16]{0:T(128)S(1)} all-gather(%p.1), channel_id=3, dimensions={0}
}

%second (p.2: f32[8]) -> f32[16] {
  %p.2 = f32[8]{0:T(128)} parameter(0)
  ROOT %all-gather.2 = f32[16]{0:T(128)S(1)} all-gather(%p.2), channel_id=3, dimensions={0}
}

%all-reduce-scatter (input: bf16[16]) -> bf16[4] {
  %input = bf16[16]{0} parameter(0)
  %all-reduce.3 = bf16[16]{0} all-reduce(%input), channel_id=4, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = bf16[4]{0} dynamic-slice(%all-reduce.3, %zero), dynamic_slice_sizes={4}
}

ENTRY %main (x: f32[8], y: bf16[16]) -> (f32[8], f32[16], bf16[4]) {
  %x = f32[8]{0} parameter(0)
  %y = bf16[16]{0} parameter(1)
  %permute-start = (f32[8]{0}, f32[8]{0}, u32[], /*index=3*/u32[]) collective-permute-start(%x)
  %permute-done = f32[8]{0} collective-permute-done(%permute-start)
  %start = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%permute-done), calls=%send
  %update = ((f32[8]{0}), f32[8]{0}, u32[]) async-update(%start), calls=%send
  %done = f32[8]{0} async-done(%update), calls=%send
  %fusion.1 = f32[16]{0} fusion(%done), kind=kCustom, calls=%first
  %fusion.2 = f32[16]{0} fusion(%done), kind=kCustom, calls=%second
  %fusion.3 = bf16[4]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  %call = f32[8]{0} custom-call(%x), custom_call_target="__cublas$gemm", backend_config={}
  ROOT %tuple = (f32[8]{0}, f32[16]{0}, bf16[4]{0}) tuple(%done, %fusion.2, %fusion.3)
}
"""


def test_an_asynchronous_collective_counts_once_however_it_is_spelled():
    assert read(ASYNCHRONOUS) == Program(
        flops=0,
        collectives={
            "all-gather": Collective(1, 0, 64, 32, beside=1),
            "all-to-all": Collective(1, 0, 32, 32),
            "collective-permute": Collective(1, 0, 32, 32),
            "reduce-scatter": Collective(1, 0, 8, 32),
        },
        unread={"__cublas$gemm": 1},
    )


KERNELS = r"""HloModule kernels

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %splash.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 512, \"block_kv\": 512}"
}}, metadata={op_name="splash"}, backend_config={"custom_call_config":{"body":"TUzv"}}
  %splash.2 = f32[8]{0} custom-call(%splash.1), custom_call_target="tpu_custom_call"
  ROOT %gmm.12 = f32[8]{0} custom-call(%splash.2), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"640","transcendentals":"0"}}}
}
"""  # noqa: E501


def test_a_kernel_counts_what_it_tells_and_is_named_if_it_tells_nothing():
    assert read(KERNELS) == Program(flops=640, collectives={}, unread={"splash": 2})


def test_a_product_of_a_kind_that_is_not_counted_is_refused():
    text = """HloModule other

ENTRY %main (x: f32[8,4], w: f32[2,4,4], n: s32[2]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[2,4,4]{2,1,0} parameter(1)
  %n = s32[2]{0} parameter(2)
  ROOT %groups = f32[8,4]{1,0} ragged-dot(%x, %w, %n), lhs_contracting_dims={1}
}
"""
    with pytest.raises(UnreadableProductError, match="%groups is a ragged-dot"):
        read(text)


ATTENTION = """HloModule attention

ENTRY %%main (q: bf16[2,512,8,64], k: bf16[2,512,4,64], v: bf16[2,512,4,32]) -> bf16[2,8,512,32] {
  %%q = bf16[2,512,8,64]{3,2,1,0} parameter(0)
  %%k = bf16[2,512,4,64]{3,2,1,0} parameter(1)
  %%v = bf16[2,512,4,32]{3,2,1,0} parameter(2)
  %%call = (bf16[2,8,512,32]{3,1,2,0}, u8[0]{0}) custom-call(%%q, %%k, %%v), custom_call_target="%s", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "512", "512"], "tuple_shapes": []}, "is_flash_attention": true, "mask_type": "%s"}}
  ROOT %%out = bf16[2,8,512,32]{3,1,2,0} get-tuple-element(%%call), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("target", "mask", "pairs", "columns"),
    [
        ("__cudnn$fmhaSoftmax", "CAUSAL", 512 * 513 // 2, 64 + 32),
        ("__cudnn$fmhaScaleBiasSoftmax", "PADDING_CAUSAL", 512 * 513 // 2, 64 + 32),
        ("__cudnn$fmhaSoftmax", "NO_MASK", 512 * 512, 64 + 32),
        ("__cudnn$fmhaSoftmaxBackward", "CAUSAL", 512 * 513 // 2, 3 * 64 + 2 * 32),
    ],
)
def test_attention_of_cudnn_counts_the_pairs_that_its_mask_leaves(target, mask, pairs, columns):
    program = read(ATTENTION % (target, mask))
    assert program.flops == 2 * 2 * 8 * pairs * columns
    assert program.unread == {}


@pytest.fixture(scope="module")
def tpu_mesh():
    """Sixteen TPU chips that are not there."""
    return make_mesh(devices_of("v5e:4x4"), {"d": 16})


def measured_on(mesh, function, spec, *arguments):
    shardings = (NamedSharding(mesh, spec),) * len(arguments)
    compiled = jax.jit(function, in_shardings=shardings).lower(*arguments).compile()
    return measure(compiled), compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (jnp.matmul, [(256, 512), (512, 1024)]),
        (jnp.matmul, [(4, 256, 512), (4, 512, 1024)]),
        (functools.partial(jnp.einsum, "abik,abjk->abij"), [(3, 4, 256, 512), (3, 4, 128, 512)]),
    ],
)
def test_flops_equal_those_of_xla_on_a_tpu(tpu_mesh, function, shapes):
    arguments = [array(*shape, dtype=jnp.bfloat16) for shape in shapes]
    program, flops = measured_on(tpu_mesh, function, P(), *arguments)
    assert program.flops == flops > 0


def test_a_loop_on_a_tpu(tpu_mesh):
    x = array(2048, 1024, dtype=jnp.bfloat16)
    program, one_trip = measured_on(tpu_mesh, repeat(lambda x: x @ x.T @ x, 7), P("d"), x)
    gather = Collective(7, 7, 7 * 2048 * 1024 * 2, 7 * 128 * 1024 * 2)
    assert program.flops == 7 * one_trip == 7 * 4 * 128 * 2048 * 1024
    assert program.collectives == {"all-gather": gather}
