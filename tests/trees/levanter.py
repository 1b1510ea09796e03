"""Levanter: models/{llama,mixtral,gpt2}.py, layers/attention.py; haliax nn/{linear,scan}.py.

Linear weights are output first with every head axis kept; Stacked adds the layer axis in front.
NamedArray is a keyless pytree node, so a jax key path ends in flat index 0.
"""

from trees.text import rows, scan, suffixed

ENDS = """
transformer/norm/weight             D    -
embeddings/token_embeddings/weight  V D  -
lm_head/weight                      V D  -
"""
ATTENTION = """
self_attn/q_proj/weight      KV G K D  oooi
self_attn/{k,v}_proj/weight  KV K D    ooi
self_attn/o_proj/weight      D H K     oii
{input,post_attention}_layernorm/weight  D  -
"""
QK_NORMS = "self_attn/{q,k}_norm/weight  K  -\n"
MLP = """
mlp/{gate,up}_proj/weight  F D  oi
mlp/down_proj/weight       D F  oi
"""
# The gate is output first, MoELinear experts are input first.
MOE = """
block_sparse_moe/gate/weight             E D    oi
block_sparse_moe/experts/w{1,3}/weight   E D F  bio
block_sparse_moe/experts/w2/weight       E F D  bio
"""
# out_first=False (input first); c_attn keeps (qkv, heads, head).
GPT2 = """
{ln_1,ln_2}/{weight,bias}  D         -
attn/c_attn/weight         D 3 H DH  iooo
attn/c_attn/bias           3 H DH    -
attn/c_proj/weight         H DH D    iio
attn/c_proj/bias           D         -
mlp/c_fc/weight            D 4*D     io
mlp/c_fc/bias              4*D       -
mlp/c_proj/weight          4*D D     io
mlp/c_proj/bias            D         -
"""
GPT2_ENDS = """
transformer/ln_f/{weight,bias}         D    -
embeddings/token_embeddings/weight     V D  -
embeddings/position_embeddings/weight  P D  -
"""
STACK, LAYER = "transformer/layers/stacked/", "transformer/layers/blocks/{0-4}/"
FAMILIES = {
    "levanter_llama": suffixed(rows(ENDS) + scan(STACK, ATTENTION + QK_NORMS + MLP), "/0"),
    "levanter_llama_unscanned": suffixed(rows(ENDS) + rows(ATTENTION + MLP, LAYER), "/0"),
    "levanter_mixtral": suffixed(rows(ENDS) + scan(STACK, ATTENTION + MOE), "/0"),
    "levanter_gpt2": suffixed(rows(GPT2_ENDS) + scan("transformer/blocks/stacked/", GPT2), "/0"),
}
