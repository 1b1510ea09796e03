"""Gemma: gemma, gm/nn/{_modules,_gemma}.py, gm/ckpts/_compat.py; flax, examples/gemma.

The output axis of query, key and value is split: fan_out is on both sides of the input axis.
"""

from trees.text import rows, scan, suffixed

ENDS = """
embedder/input_embedding  V D  -
final_norm/scale          D    -
"""
FUSED = """
attn/qkv_einsum/w       3 H D K   boio
attn/attn_vec_einsum/w  H K D     iio
pre_{attention,ffw}_norm/scale  D  -
"""
GROUPED = """
attn/q_einsum/w         H D K     oio
attn/kv_einsum/w        2 KV D K  boio
attn/attn_vec_einsum/w  H K D     iio
pre_{attention,ffw}_norm/scale  D  -
"""
POST_NORMS = "post_{attention,ffw}_norm/scale  D  -\n"
QK_NORMS = "attn/{_query,_key}_norm/scale  K  -\n"
MLP = """
mlp/gating_einsum  2 D F  bio
mlp/linear         F D    io
"""
# transpose_gating_einsum=True, also in Gemma 2 9B and 27B: (2, out, in) under the very same name.
TRANSPOSED = """
mlp/gating_einsum  2 F D  boi
mlp/linear         F D    io
"""
GATED = """
mlp/{gate,up}_proj/kernel  D F  io
mlp/down_proj/kernel       F D  io
"""
# The released naming has a prefix, and `w` on MLP leaves.
RELEASED = (
    (GROUPED + POST_NORMS + MLP).replace("einsum ", "einsum/w ").replace("linear", "linear/w")
)
# The einsum leaves of NNX are `kernel`, and each variable adds `value` at the end.
NNX = GROUPED.replace("/w ", "/kernel ") + POST_NORMS + QK_NORMS + GATED
LAYER = "layer_{0-4}/"
FAMILIES = {
    "gemma1_7b": rows(ENDS) + rows(FUSED + MLP, LAYER),
    "gemma2_2b": rows(ENDS) + rows(GROUPED + POST_NORMS + MLP, LAYER),
    "gemma2_checkpoint": rows(ENDS, "transformer/") + rows(RELEASED, f"transformer/{LAYER}"),
    "gemma3": rows(ENDS) + rows(GROUPED + POST_NORMS + QK_NORMS + TRANSPOSED, LAYER),
    # models/ppp/gemma.py as in PaliGemma
    "big_vision_gemma_scan": rows(ENDS, "params/llm/") + scan("params/llm/layers/", GROUPED + MLP),
    "flax_nnx_gemma": suffixed(
        rows(ENDS.replace("input_", "")) + rows(NNX, "layers/{0-4}/"), "/value"
    ),
}
