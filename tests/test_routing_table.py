"""The table of routes as it is printed."""

import pytest
from flax import nnx
from test_routing import NnxBlock, nested

from muon_jax import MatrixAxes, routing_table

TABLE = """\
path               shape      matrices  label   why
attn/key/bias      (2, 4)     -         other   a bias
attn/key/kernel    (8, 2, 4)  8 × 8     muon    an attention kernel split into heads
attn/out/bias      (8,)       -         other   a bias
attn/out/kernel    (2, 4, 8)  8 × 8     muon    an attention kernel split into heads
attn/query/bias    (2, 4)     -         other   a bias
attn/query/kernel  (8, 2, 4)  8 × 8     muon    an attention kernel split into heads
attn/value/bias    (2, 4)     -         other   a bias
attn/value/kernel  (8, 2, 4)  8 × 8     muon    an attention kernel split into heads
down/kernel        (32, 8)    32 × 8    muon    a kernel (fan_in, fan_out)
norm/scale         (8,)       -         other   a norm or gain
up/bias            (32,)      -         frozen  rule 'up/bias'
up/kernel          (8, 32)    8 × 32    muon    a kernel (fan_in, fan_out)

muon: 6 leaves, 768 parameters (91.4 %)
other: 5 leaves, 40 parameters (4.8 %)
frozen: 1 leaf, 32 parameters (3.8 %)
"""


def test_the_table_of_a_flax_block():
    params = nnx.state(nnx.eval_shape(lambda: NnxBlock(nnx.Rngs(0))), nnx.Param)
    assert routing_table(params, [("up/bias", "frozen")]) + "\n" == TABLE


def test_the_table_counts_a_stack():
    table = routing_table(nested({"moe/experts/up": (2, 3, 4, 8)}))
    assert "2 × 3 × (4 × 8)" in table and table.endswith("muon: 1 leaf, 192 parameters (100.0 %)")


@pytest.mark.parametrize(
    "parts,shown",
    [
        ({}, "2 × (8 × 24)"),
        ({"split_fan_out": 3}, "2 × 3 × (8 × 8)"),
        ({"split_fan_in": 2, "split_fan_out": 3}, "2 × 2 × 3 × (4 × 8)"),
        ({"split_fan_out": (16, 4, 4)}, "2 × 1 × (8 × 16) + 2 × 2 × (8 × 4)"),
    ],
)
def test_the_table_shows_parts(parts, shown):
    table = routing_table(nested({"qkv/kernel": (2, 8, 24)}), [("qkv", MatrixAxes(**parts))])
    assert f"(2, 8, 24)  {shown}  muon" in table
