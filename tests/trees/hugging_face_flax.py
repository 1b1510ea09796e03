"""Hugging Face, Flax: transformers 4, models/*/modeling_flax_*.py."""

import re

from trees import hugging_face
from trees.text import rows


def in_flax(leaves):
    """The tree of the same model in Flax, whose kernels are input first."""
    norm = re.compile("LayerNorm/weight$")
    for path, shape, roles in leaves:
        path = norm.sub("LayerNorm/scale", path.replace(".", "/"))
        array = "kernel" if roles == "oi" or "relationship" in path else "embedding"
        transposed = array == "kernel" and len(shape) == 2
        path = re.sub("weight$", array, path)
        yield path, shape[::-1] if transposed else shape, roles.replace("oi", "io")


# FlaxConv1D creates its kernel as (features, inputs) and transposes it when called, so these are
# output first, against the torch Conv1D and against every other Flax kernel.
GPT2_ENDS = """
transformer/wte/embedding      V D  -
transformer/wpe/embedding      P D  -
transformer/ln_f/{scale,bias}  D    -
lm_head/kernel                 D V  -
"""
GPT2 = """
{ln_1,ln_2}/{scale,bias}  D      -
attn/c_attn/kernel        3*D D  oi
attn/c_attn/bias          3*D    -
attn/c_proj/kernel        D D    oi
{attn,mlp}/c_proj/bias    D      -
mlp/c_fc/kernel           F D    oi
mlp/c_fc/bias             F      -
mlp/c_proj/kernel         D F    oi
"""
# Norm gains are called `weight`.
ENDS = """
model/embed_tokens/embedding  V D  -
model/norm/weight             D    -
lm_head/kernel                D V  -
"""
LLAMA = """
{input,post_attention}_layernorm/weight  D  -
self_attn/{q,o}_proj/kernel  D D      io
self_attn/{k,v}_proj/kernel  D KV*DH  io
mlp/{gate,up}_proj/kernel    D F      io
mlp/down_proj/kernel         F D      io
"""
tied = [row for row in hugging_face.FAMILIES["hf_bert"] if "predictions.decoder" not in row[0]]
FAMILIES = {
    "hf_flax_gpt2": rows(GPT2_ENDS) + rows(GPT2, "transformer/h/{0-4}/"),
    "hf_flax_bert": list(in_flax(tied)),
    "hf_flax_llama": rows(ENDS) + rows(LLAMA, "model/layers/{0-4}/"),
}
