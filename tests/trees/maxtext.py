"""MaxText: models/{llama2,mixtral,deepseek,gpt3}.py, layers/{attentions,linears,moe}.py.

`param_scan_axis` is 1, so the layer axis is the second axis of every leaf, norm gains too; with
scan_layers=False there is one subtree `layers_<n>` per layer.
"""

from trees.text import rows, scan

ENDS = """
params/token_embedder/embedding      V D  -
params/decoder/decoder_norm/scale    D    -
params/decoder/logits_dense/kernel   D V  -
"""
ATTENTION = """
{pre,post}_self_attention_layer_norm/scale  D  -
self_attention/query/kernel        D H K   ioo
self_attention/{key,value}/kernel  D KV K  ioo
self_attention/out/kernel          H K D   iio
"""
MLP = """
mlp/wi_{0,1}/kernel  D F  io
mlp/wo/kernel        F D  io
"""
MOE = """
MoeBlock_0/gate/kernel  D E    io
MoeBlock_0/wi_{0,1}     E D F  bio
MoeBlock_0/wo           E F D  bio
"""
QK_NORMS = "self_attention/{query,key}_norm/scale  K  -\n"
LATENT = """
{pre,post}_self_attention_layer_norm/scale  D  -
self_attention/wq_a/kernel   D QL     io
self_attention/q_norm/scale  QL       -
self_attention/wq_b/kernel   QL H QH  ioo
self_attention/wkv_a/kernel  D KR     io
self_attention/kv_norm/scale  KL      -
self_attention/wkv_b/kernel  KL H KH  ioo
self_attention/out/kernel    H VH D   iio
"""
# RoutedAndSharedMoE of layers/moe.py, below the names of the Linen decoder.
SHARED_MOE = """
DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel           D E     io
DeepSeekMoeBlock_0/MoeBlock_0/gate/bias             E       -
DeepSeekMoeBlock_0/MoeBlock_0/wi_{0,1}              E D FM  bio
DeepSeekMoeBlock_0/MoeBlock_0/wo                    E FM D  bio
DeepSeekMoeBlock_0/shared_experts/wi_{0,1}/kernel   D FS    io
DeepSeekMoeBlock_0/shared_experts/wo/kernel         FS D    io
"""
GPT3_ENDS = """
params/token_embedder/embedding             V D  -
params/decoder/position_embedder/embedding  P D  -
params/decoder/decoder_norm/{scale,bias}    D    -
"""
GPT3 = """
pre_self_attention_norm/{scale,bias}  D        -
self_attention/qkv_proj/kernel        D 3 H K  iooo
self_attention/qkv_proj/bias          3 H K    -
self_attention/out/kernel             H K D    iio
self_attention/out/bias               D        -
mlp/mlp_layer_norm/{scale,bias}       D        -
mlp/wi/kernel                         D F      io
mlp/wi/bias                           F        -
mlp/wo/kernel                         F D      io
mlp/wo/bias                           D        -
"""
STACK, LAYER = "params/decoder/layers/", "params/decoder/layers_{0-4}/"
FAMILIES = {
    "maxtext_llama_scan": rows(ENDS) + scan(STACK, ATTENTION + QK_NORMS + MLP, 1),
    "maxtext_llama_unscanned": rows(ENDS) + rows(ATTENTION + MLP, LAYER),
    "maxtext_mixtral_scan": rows(ENDS) + scan(STACK, ATTENTION + MOE, 1),
    "maxtext_mixtral_unscanned": rows(ENDS) + rows(ATTENTION + MOE, LAYER),
    "maxtext_deepseek_scan": rows(ENDS)
    + scan("params/decoder/dense_layers/", LATENT + MLP, 1, size=3)
    + scan("params/decoder/moe_layers/", LATENT + SHARED_MOE, 1),
    "maxtext_gpt3_scan": rows(GPT3_ENDS) + scan(STACK, GPT3, 1),
}
