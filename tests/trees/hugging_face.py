"""Hugging Face, torch state dicts: transformers, models/*/modeling_*.py.

Linear weights are (out, in). Two names for one model are those of transformers 4, also of the
hub's checkpoints, and of transformers 5, whose fused experts have no `.weight` at their end.
"""

from trees.text import rows

# Conv1D weights are (in, out).
GPT2_ENDS = """
transformer.wte.weight          V D  -
transformer.wpe.weight          P D  -
transformer.ln_f.{weight,bias}  D    -
lm_head.weight                  V D  -
"""
GPT2 = """
{ln_1,ln_2}.{weight,bias}  D      -
attn.c_attn.weight         D 3*D  io
attn.c_attn.bias           3*D    -
attn.c_proj.weight         D D    io
{attn,mlp}.c_proj.bias     D      -
mlp.c_fc.weight            D F    io
mlp.c_fc.bias              F      -
mlp.c_proj.weight          F D    io
"""
ENDS = """
model.embed_tokens.weight  V D  -
model.norm.weight          D    -
lm_head.weight             V D  -
"""
ATTENTION = """
{input,post_attention}_layernorm.weight  D  -
self_attn.q_proj.weight      H*K D   oi
self_attn.{k,v}_proj.weight  KV*K D  oi
self_attn.o_proj.weight      D H*K   oi
"""
QKV_BIASES = """
self_attn.q_proj.bias      H*K   -
self_attn.{k,v}_proj.bias  KV*K  -
"""
QK_NORMS = "self_attn.{q,k}_norm.weight  K  -\n"
MLP = """
mlp.{gate,up}_proj.weight  F D  oi
mlp.down_proj.weight       D F  oi
"""
# w1 and w3 go from width to ffn, w2 goes back.
MIXTRAL = """
block_sparse_moe.gate.weight                  E D  oi
block_sparse_moe.experts.{0-6}.w{1,3}.weight  F D  oi
block_sparse_moe.experts.{0-6}.w2.weight      D F  oi
"""
MIXTRAL_5 = """
mlp.gate.weight           E D      oi
mlp.experts.gate_up_proj  E 2*F D  boi
mlp.experts.down_proj     E D F    boi
"""
EXPERTS = """
mlp.experts.{0-6}.{gate,up}_proj.weight  FM D  oi
mlp.experts.{0-6}.down_proj.weight       D FM  oi
"""
EXPERTS_5 = """
mlp.experts.gate_up_proj  E 2*FM D  boi
mlp.experts.down_proj     E D FM    boi
"""
# The expert names of Mixtral in transformers 5 with the transposed layout and 2-D biases.
GPT_OSS = """
self_attn.o_proj.bias          D        -
self_attn.sinks                H        -
mlp.experts.gate_up_proj       E D 2*F  bio
mlp.experts.gate_up_proj_bias  E 2*F    -
mlp.experts.down_proj          E F D    bio
mlp.experts.down_proj_bias     E D      -
mlp.router.weight              E D      oi
mlp.router.bias                E        -
"""
LATENT = """
{input,post_attention}_layernorm.weight  D  -
self_attn.q_a_proj.weight            QL D     oi
self_attn.q_a_layernorm.weight       QL       -
self_attn.q_b_proj.weight            H*QH QL  oi
self_attn.kv_a_proj_with_mqa.weight  KR D     oi
self_attn.kv_a_layernorm.weight      KL       -
self_attn.kv_b_proj.weight           H*KH KL  oi
self_attn.o_proj.weight              D H*VH   oi
"""
SHARED_MOE = """
mlp.gate.weight                           E D   oi
mlp.gate.e_score_correction_bias          E     -
mlp.shared_experts.{gate,up}_proj.weight  FS D  oi
mlp.shared_experts.down_proj.weight       D FS  oi
"""
GATE = "mlp.gate.weight  E D  oi\n"
LAYER = "model.layers.{0-4}."
DEEPSEEK = rows(ENDS) + rows(LATENT + MLP, "model.layers.{0-2}.")

# Norms are called layer_norm; relative_attention_bias, an Embedding of shape (buckets, heads), is
# in block 0 alone.
T5_ENDS = """
{shared,lm_head,encoder.embed_tokens,decoder.embed_tokens}.weight  V D  -
{encoder,decoder}.final_layer_norm.weight                          D    -
{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight  R H  -
"""
T5_SELF = """
layer.0.SelfAttention.{q,k,v}.weight  H*K D  oi
layer.0.SelfAttention.o.weight        D H*K  oi
layer.0.layer_norm.weight             D      -
"""
T5_CROSS = """
layer.1.EncDecAttention.{q,k,v}.weight  H*K D  oi
layer.1.EncDecAttention.o.weight        D H*K  oi
layer.1.layer_norm.weight               D      -
"""
T5_MLP = """
DenseReluDense.wi_{0,1}.weight  F D  oi
DenseReluDense.wo.weight        D F  oi
layer_norm.weight               D    -
"""
BERT_ENDS = """
bert.embeddings.word_embeddings.weight        V D  -
bert.embeddings.position_embeddings.weight    P D  -
bert.embeddings.token_type_embeddings.weight  2 D  -
bert.embeddings.LayerNorm.{weight,bias}       D    -
bert.pooler.dense.weight                      D D  oi
bert.pooler.dense.bias                        D    -
"""
BERT = """
attention.self.{query,key,value}.weight    D D  oi
attention.self.{query,key,value}.bias      D    -
attention.output.dense.weight              D D  oi
attention.output.LayerNorm.{weight,bias}   D    -
{attention.output,output}.dense.bias       D    -
intermediate.dense.weight                  F D  oi
intermediate.dense.bias                    F    -
output.dense.weight                        D F  oi
output.LayerNorm.{weight,bias}             D    -
"""
PRETRAINING = """
cls.predictions.transform.dense.weight             D D  oi
cls.predictions.transform.dense.bias               D    -
cls.predictions.transform.LayerNorm.{weight,bias}  D    -
cls.predictions.{bias,decoder.bias}                V    -
cls.predictions.decoder.weight                     V D  -
cls.seq_relationship.weight                        2 D  -
cls.seq_relationship.bias                          2    -
"""
CLASSIFIER = """
classifier.weight  C D  -
classifier.bias    C    -
"""
BERT_BODY = rows(BERT_ENDS) + rows(BERT, "bert.encoder.layer.{0-4}.")
FAMILIES = {
    "hf_gpt2": rows(GPT2_ENDS) + rows(GPT2, "transformer.h.{0-4}."),
    "hf_llama": rows(ENDS) + rows(ATTENTION + MLP, LAYER),
    "hf_qwen2": rows(ENDS) + rows(ATTENTION + QKV_BIASES + MLP, LAYER),
    "hf_qwen3": rows(ENDS) + rows(ATTENTION + QK_NORMS + MLP, LAYER),
    "hf_bert": BERT_BODY + rows(PRETRAINING),
    "hf_bert_classifier": BERT_BODY + rows(CLASSIFIER),
    "hf_t5": rows(T5_ENDS)
    + rows(T5_SELF, "encoder.block.{0-4}.")
    + rows(T5_MLP, "encoder.block.{0-4}.layer.1.")
    + rows(T5_SELF + T5_CROSS, "decoder.block.{0-4}.")
    + rows(T5_MLP, "decoder.block.{0-4}.layer.2."),
    "hf_mixtral": rows(ENDS) + rows(ATTENTION + MIXTRAL, LAYER),
    "hf_mixtral_v5": rows(ENDS) + rows(ATTENTION + MIXTRAL_5, LAYER),
    "hf_qwen3_moe": rows(ENDS) + rows(ATTENTION + QK_NORMS + GATE + EXPERTS, LAYER),
    "hf_gpt_oss": rows(ENDS) + rows(ATTENTION + QKV_BIASES + GPT_OSS, LAYER),
    "hf_deepseek_v3": DEEPSEEK + rows(LATENT + SHARED_MOE + EXPERTS, "model.layers.{3,4}."),
    "hf_deepseek_v3_v5": DEEPSEEK + rows(LATENT + SHARED_MOE + EXPERTS_5, "model.layers.{3,4}."),
}
