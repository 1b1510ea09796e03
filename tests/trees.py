"""Parameter trees of public model families: leaf paths, shapes, labels and axis roles.

Every family function returns rows ``(path, shape, label, fan_in_axes, fan_out_axes)``. ``label``
is ``"muon"`` for hidden matrices and ``"other"`` for the rest; the axis tuples are ``None`` on
adamw rows. An axis in neither tuple is a batch of independent matrices (stacked layers, experts).

Two conventions hold throughout:

* stacked parts (query/key/value, key/value, gate/up) whose axis comes before the input axis count
  as a batch; where the part axis comes after the input axis it belongs to the output;
* patch embeddings, heads (also pre-training heads) and learned probes are other, while poolers
  and head transforms, which map width to width, are muon.
"""

from __future__ import annotations

L = 5  # layers
LD = 3  # leading dense layers of a mixture-of-experts model
D = 96  # model width
H = 6  # query heads
KV = 2  # key/value heads
G = H // KV  # query heads per key/value head
K = 24  # head width where it is free
DH = D // H  # head width where it is width / heads
F = 160  # feed-forward width
FM = 76  # expert width
FS = 3 * FM  # width of the shared experts together
E = 7  # experts
V = 512  # vocabulary
P = 56  # positions
C = 10  # classes
R = 32  # relative position buckets
QL, KL, NOPE, ROPE, VH = 40, 28, 18, 8, 21  # latent attention


def mu(path, shape, fan_in, fan_out):
    return (path, tuple(shape), "muon", tuple(fan_in), tuple(fan_out))


def ad(path, *shape):
    return (path, shape, "other", None, None)


def insert_axis(rows, axis, size=L, prefix=""):
    """Stack the rows' leaves along a new axis and put a prefix before their paths."""

    def shift(axes):
        return None if axes is None else tuple(a + (a >= axis) for a in axes)

    return [
        (prefix + p, s[:axis] + (size,) + s[axis:], label, shift(i), shift(o))
        for p, s, label, i, o in rows
    ]


def repeat(rows, template, count=L, start=0):
    """One copy of the rows per layer; the template holds one ``{}`` for the layer number."""
    return [
        (template.format(n) + p, *rest) for n in range(start, start + count) for p, *rest in rows
    ]


def suffix(rows, end):
    return [(p + end, *rest) for p, *rest in rows]


def io(path, fan_in, fan_out):
    """A matrix stored input first."""
    n, m = len(fan_in), len(fan_out)
    return mu(path, fan_in + fan_out, range(n), range(n, n + m))


def oi(path, fan_out, fan_in):
    """A matrix stored output first."""
    n, m = len(fan_out), len(fan_in)
    return mu(path, fan_out + fan_in, range(n, n + m), range(n))


# --- MaxText ---------------------------------------------------------------------------------


def _maxtext_attention(qk_norm=False):
    a = "self_attention/"
    rows = [
        io(a + "query/kernel", (D,), (H, K)),
        io(a + "key/kernel", (D,), (KV, K)),
        io(a + "value/kernel", (D,), (KV, K)),
        io(a + "out/kernel", (H, K), (D,)),
    ]
    if qk_norm:
        rows += [ad(a + "query_norm/scale", K), ad(a + "key_norm/scale", K)]
    return rows


def _maxtext_mlp(prefix="mlp/", width=F):
    return [
        io(prefix + "wi_0/kernel", (D,), (width,)),
        io(prefix + "wi_1/kernel", (D,), (width,)),
        io(prefix + "wo/kernel", (width,), (D,)),
    ]


def _maxtext_norms():
    return [
        ad("pre_self_attention_layer_norm/scale", D),
        ad("post_self_attention_layer_norm/scale", D),
    ]


def _maxtext_moe(width, prefix="MoeBlock_0/", gate_bias=False):
    rows = [
        io(prefix + "gate/kernel", (D,), (E,)),
        mu(prefix + "wi_0", (E, D, width), (1,), (2,)),
        mu(prefix + "wi_1", (E, D, width), (1,), (2,)),
        mu(prefix + "wo", (E, width, D), (1,), (2,)),
    ]
    return rows + ([ad(prefix + "gate/bias", E)] if gate_bias else [])


def _maxtext_ends():
    return [
        ad("params/token_embedder/embedding", V, D),
        ad("params/decoder/decoder_norm/scale", D),
        ad("params/decoder/logits_dense/kernel", D, V),
    ]


def maxtext_llama_scan():
    """MaxText, models/llama2.py with layers/{attentions,linears,decoders}.py, scan_layers=True.

    ``param_scan_axis`` is 1, so the layer axis is the second axis of every leaf, norm gains too.
    """
    block = _maxtext_attention(qk_norm=True) + _maxtext_mlp() + _maxtext_norms()
    return _maxtext_ends() + insert_axis(block, 1, prefix="params/decoder/layers/")


def maxtext_llama_unscanned():
    """MaxText, the same files, scan_layers=False: one subtree ``layers_<n>`` per layer."""
    block = _maxtext_attention() + _maxtext_mlp() + _maxtext_norms()
    return _maxtext_ends() + repeat(block, "params/decoder/layers_{}/")


def maxtext_mixtral_scan():
    """MaxText, models/mixtral.py and layers/moe.py (RoutedMoE): experts first, then layers."""
    block = _maxtext_attention() + _maxtext_moe(F) + _maxtext_norms()
    return _maxtext_ends() + insert_axis(block, 1, prefix="params/decoder/layers/")


def maxtext_mixtral_unscanned():
    """MaxText, models/mixtral.py with scan_layers=False."""
    block = _maxtext_attention() + _maxtext_moe(F) + _maxtext_norms()
    return _maxtext_ends() + repeat(block, "params/decoder/layers_{}/")


def maxtext_deepseek_scan():
    """MaxText, models/deepseek.py, layers/attention_mla.py, layers/moe.py (RoutedAndSharedMoE).

    Two scanned stacks, ``dense_layers`` and ``moe_layers``, in the Linen decoder's naming.
    """
    a = "self_attention/"
    attention = [
        io(a + "wq_a/kernel", (D,), (QL,)),
        ad(a + "q_norm/scale", QL),
        io(a + "wq_b/kernel", (QL,), (H, NOPE + ROPE)),
        io(a + "wkv_a/kernel", (D,), (KL + ROPE,)),
        ad(a + "kv_norm/scale", KL),
        io(a + "wkv_b/kernel", (KL,), (H, NOPE + VH)),
        io(a + "out/kernel", (H, VH), (D,)),
    ]
    block = "DeepSeekMoeBlock_0/"
    dense = attention + _maxtext_mlp() + _maxtext_norms()
    moe = attention + _maxtext_norms()
    moe += _maxtext_moe(FM, block + "MoeBlock_0/", gate_bias=True)
    moe += _maxtext_mlp(block + "shared_experts/", FS)
    return (
        _maxtext_ends()
        + insert_axis(dense, 1, LD, "params/decoder/dense_layers/")
        + insert_axis(moe, 1, L, "params/decoder/moe_layers/")
    )


def maxtext_gpt3_scan():
    """MaxText, models/gpt3.py, scanned: fused qkv_proj, biases of up to four axes, tied logits."""
    a = "self_attention/"
    block = [
        ad("pre_self_attention_norm/scale", D),
        ad("pre_self_attention_norm/bias", D),
        io(a + "qkv_proj/kernel", (D,), (3, H, K)),
        ad(a + "qkv_proj/bias", 3, H, K),
        io(a + "out/kernel", (H, K), (D,)),
        ad(a + "out/bias", D),
        ad("mlp/mlp_layer_norm/scale", D),
        ad("mlp/mlp_layer_norm/bias", D),
        io("mlp/wi/kernel", (D,), (F,)),
        ad("mlp/wi/bias", F),
        io("mlp/wo/kernel", (F,), (D,)),
        ad("mlp/wo/bias", D),
    ]
    return [
        ad("params/token_embedder/embedding", V, D),
        ad("params/decoder/position_embedder/embedding", P, D),
        ad("params/decoder/decoder_norm/scale", D),
        ad("params/decoder/decoder_norm/bias", D),
    ] + insert_axis(block, 1, prefix="params/decoder/layers/")


# --- Levanter --------------------------------------------------------------------------------


def _levanter_llama_attention(qk_norm=False):
    a = "self_attn/"
    rows = [
        oi(a + "q_proj/weight", (KV, G, K), (D,)),
        oi(a + "k_proj/weight", (KV, K), (D,)),
        oi(a + "v_proj/weight", (KV, K), (D,)),
        oi(a + "o_proj/weight", (D,), (H, K)),
    ]
    if qk_norm:
        rows += [ad(a + "q_norm/weight", K), ad(a + "k_norm/weight", K)]
    norms = ["input_layernorm/weight", "post_attention_layernorm/weight"]
    return rows + [ad(n, D) for n in norms]


def _levanter_llama_mlp():
    return [
        oi("mlp/gate_proj/weight", (F,), (D,)),
        oi("mlp/up_proj/weight", (F,), (D,)),
        oi("mlp/down_proj/weight", (D,), (F,)),
    ]


def _levanter_ends():
    return [
        ad("transformer/norm/weight", D),
        ad("embeddings/token_embeddings/weight", V, D),
        ad("lm_head/weight", V, D),
    ]


def levanter_llama():
    """Levanter, models/llama.py and layers/attention.py; haliax nn/linear.py, nn/scan.py.

    Linear weights are output first with every head axis kept; Stacked adds the layer axis in
    front. NamedArray is a keyless pytree node, so a jax key path ends in flat index 0.
    """
    block = _levanter_llama_attention(qk_norm=True) + _levanter_llama_mlp()
    rows = insert_axis(block, 0, prefix="transformer/layers/stacked/")
    return suffix(rows + _levanter_ends(), "/0")


def levanter_llama_unscanned():
    """Levanter, models/llama.py with scan_layers=False (haliax BlockSeq: ``layers/blocks/<n>``)."""
    block = _levanter_llama_attention() + _levanter_llama_mlp()
    return suffix(repeat(block, "transformer/layers/blocks/{}/") + _levanter_ends(), "/0")


def levanter_mixtral():
    """Levanter, models/mixtral.py: the gate is output first, MoELinear experts are input first."""
    m = "block_sparse_moe/"
    block = _levanter_llama_attention() + [
        oi(m + "gate/weight", (E,), (D,)),
        mu(m + "experts/w1/weight", (E, D, F), (1,), (2,)),
        mu(m + "experts/w2/weight", (E, F, D), (1,), (2,)),
        mu(m + "experts/w3/weight", (E, D, F), (1,), (2,)),
    ]
    rows = insert_axis(block, 0, prefix="transformer/layers/stacked/")
    return suffix(rows + _levanter_ends(), "/0")


def levanter_gpt2():
    """Levanter, models/gpt2.py: out_first=False (input first); c_attn keeps (qkv, heads, head)."""
    block = [
        ad("ln_1/weight", D),
        ad("ln_1/bias", D),
        io("attn/c_attn/weight", (D,), (3, H, DH)),
        ad("attn/c_attn/bias", 3, H, DH),
        io("attn/c_proj/weight", (H, DH), (D,)),
        ad("attn/c_proj/bias", D),
        ad("ln_2/weight", D),
        ad("ln_2/bias", D),
        io("mlp/c_fc/weight", (D,), (4 * D,)),
        ad("mlp/c_fc/bias", 4 * D),
        io("mlp/c_proj/weight", (4 * D,), (D,)),
        ad("mlp/c_proj/bias", D),
    ]
    rows = insert_axis(block, 0, prefix="transformer/blocks/stacked/") + [
        ad("transformer/ln_f/weight", D),
        ad("transformer/ln_f/bias", D),
        ad("embeddings/token_embeddings/weight", V, D),
        ad("embeddings/position_embeddings/weight", P, D),
    ]
    return suffix(rows, "/0")


# --- Hugging Face, torch state dicts ----------------------------------------------------------


def _hf_linear(path, out, inp, bias=False):
    return [oi(path + ".weight", (out,), (inp,))] + ([ad(path + ".bias", out)] if bias else [])


def _hf_norm(path, bias=True):
    return [ad(path + ".weight", D)] + ([ad(path + ".bias", D)] if bias else [])


def hf_gpt2():
    """transformers, models/gpt2/modeling_gpt2.py: Conv1D weights are (in, out), unlike Linear."""

    def conv1d(path, inp, out):
        return [io(path + ".weight", (inp,), (out,)), ad(path + ".bias", out)]

    block = (
        _hf_norm("ln_1")
        + conv1d("attn.c_attn", D, 3 * D)
        + conv1d("attn.c_proj", D, D)
        + _hf_norm("ln_2")
        + conv1d("mlp.c_fc", D, F)
        + conv1d("mlp.c_proj", F, D)
    )
    ends = [ad("transformer.wte.weight", V, D), ad("transformer.wpe.weight", P, D)]
    tail = _hf_norm("transformer.ln_f") + [ad("lm_head.weight", V, D)]
    return ends + repeat(block, "transformer.h.{}.") + tail


def _hf_llama_attention(qk_norm=False, qkv_bias=False):
    a = "self_attn."
    rows = (
        _hf_linear(a + "q_proj", H * K, D, qkv_bias)
        + _hf_linear(a + "k_proj", KV * K, D, qkv_bias)
        + _hf_linear(a + "v_proj", KV * K, D, qkv_bias)
        + _hf_linear(a + "o_proj", D, H * K)
    )
    if qk_norm:
        rows += [ad(a + "q_norm.weight", K), ad(a + "k_norm.weight", K)]
    return rows + _hf_llama_norms()


def _hf_llama_norms():
    return _hf_norm("input_layernorm", False) + _hf_norm("post_attention_layernorm", False)


def _hf_llama_mlp(prefix="mlp.", width=F):
    return (
        _hf_linear(prefix + "gate_proj", width, D)
        + _hf_linear(prefix + "up_proj", width, D)
        + _hf_linear(prefix + "down_proj", D, width)
    )


def _hf_llama_ends():
    return [
        ad("model.embed_tokens.weight", V, D),
        ad("model.norm.weight", D),
        ad("lm_head.weight", V, D),
    ]


def hf_llama():
    """transformers, models/llama/modeling_llama.py: Linear weights are (out, in)."""
    block = _hf_llama_attention() + _hf_llama_mlp()
    return _hf_llama_ends() + repeat(block, "model.layers.{}.")


def hf_qwen2():
    """transformers, models/qwen2/modeling_qwen2.py: biases on q, k and v only."""
    block = _hf_llama_attention(qkv_bias=True) + _hf_llama_mlp()
    return _hf_llama_ends() + repeat(block, "model.layers.{}.")


def hf_qwen3():
    """transformers, models/qwen3/modeling_qwen3.py: per-head q_norm and k_norm gains."""
    block = _hf_llama_attention(qk_norm=True) + _hf_llama_mlp()
    return _hf_llama_ends() + repeat(block, "model.layers.{}.")


def _hf_bert_body(sep=".", dense=_hf_linear, norm=_hf_norm, last="weight"):
    s = sep
    block = (
        dense(s.join(["attention", "self", "query"]), D, D, True)
        + dense(s.join(["attention", "self", "key"]), D, D, True)
        + dense(s.join(["attention", "self", "value"]), D, D, True)
        + dense(s.join(["attention", "output", "dense"]), D, D, True)
        + norm(s.join(["attention", "output", "LayerNorm"]))
        + dense(s.join(["intermediate", "dense"]), F, D, True)
        + dense(s.join(["output", "dense"]), D, F, True)
        + norm(s.join(["output", "LayerNorm"]))
    )
    e = s.join(["bert", "embeddings", ""])
    return (
        [
            ad(e + s.join(["word_embeddings", last]), V, D),
            ad(e + s.join(["position_embeddings", last]), P, D),
            ad(e + s.join(["token_type_embeddings", last]), 2, D),
        ]
        + norm(e + "LayerNorm")
        + repeat(block, s.join(["bert", "encoder", "layer", "{}", ""]))
        + dense(s.join(["bert", "pooler", "dense"]), D, D, True)
    )


def hf_bert():
    """transformers, models/bert/modeling_bert.py, BertForPreTraining."""
    t = "cls.predictions."
    return (
        _hf_bert_body()
        + _hf_linear(t + "transform.dense", D, D, True)
        + _hf_norm(t + "transform.LayerNorm")
        + [
            ad(t + "bias", V),
            ad(t + "decoder.weight", V, D),
            ad(t + "decoder.bias", V),
            ad("cls.seq_relationship.weight", 2, D),
            ad("cls.seq_relationship.bias", 2),
        ]
    )


def hf_bert_classifier():
    """transformers, models/bert/modeling_bert.py, BertForSequenceClassification."""
    return _hf_bert_body() + [ad("classifier.weight", C, D), ad("classifier.bias", C)]


def hf_t5():
    """transformers, models/t5/modeling_t5.py, gated and untied (the v1.1 layout).

    Norms are called layer_norm; relative_attention_bias, an Embedding of shape (buckets, heads),
    is in block 0 alone.
    """

    def attention(path):
        rows = [r for n in "qkv" for r in _hf_linear(f"{path}.{n}", H * K, D)]
        return rows + _hf_linear(f"{path}.o", D, H * K)

    def feed_forward(layer):
        d = f"layer.{layer}.DenseReluDense."
        rows = _hf_linear(d + "wi_0", F, D) + _hf_linear(d + "wi_1", F, D)
        return rows + _hf_linear(d + "wo", D, F) + _hf_norm(f"layer.{layer}.layer_norm", False)

    self_attention = attention("layer.0.SelfAttention") + _hf_norm("layer.0.layer_norm", False)
    cross = attention("layer.1.EncDecAttention") + _hf_norm("layer.1.layer_norm", False)
    rows = [ad("shared.weight", V, D), ad("lm_head.weight", V, D)]
    for side, block in [
        ("encoder", self_attention + feed_forward(1)),
        ("decoder", self_attention + cross + feed_forward(2)),
    ]:
        rows += [
            ad(side + ".embed_tokens.weight", V, D),
            ad(side + ".block.0.layer.0.SelfAttention.relative_attention_bias.weight", R, H),
            ad(side + ".final_layer_norm.weight", D),
        ] + repeat(block, side + ".block.{}.")
    return rows


def hf_mixtral():
    """transformers 4, models/mixtral/modeling_mixtral.py, also the hub checkpoints' naming.

    w1 and w3 go from width to ffn, w2 goes back; one (out, in) matrix per expert.
    """
    m = "block_sparse_moe."
    experts = [
        oi(f"{m}experts.{e}.{n}.weight", *((D,), (F,)) if n == "w2" else ((F,), (D,)))
        for e in range(E)
        for n in ("w1", "w2", "w3")
    ]
    block = _hf_llama_attention() + _hf_linear(m + "gate", E, D) + experts
    return _hf_llama_ends() + repeat(block, "model.layers.{}.")


def hf_mixtral_v5():
    """transformers 5, models/mixtral/modeling_mixtral.py: fused (expert, out, in) stacks.

    The expert leaves have no ``.weight`` at the end of their names.
    """
    block = (
        _hf_llama_attention()
        + _hf_linear("mlp.gate", E, D)
        + [
            mu("mlp.experts.gate_up_proj", (E, 2 * F, D), (2,), (1,)),
            mu("mlp.experts.down_proj", (E, D, F), (2,), (1,)),
        ]
    )
    return _hf_llama_ends() + repeat(block, "model.layers.{}.")


def hf_qwen3_moe():
    """transformers, models/qwen3_moe/modeling_qwen3_moe.py, per-expert hub checkpoint naming."""
    experts = [r for e in range(E) for r in _hf_llama_mlp(f"mlp.experts.{e}.", FM)]
    block = _hf_llama_attention(qk_norm=True) + _hf_linear("mlp.gate", E, D) + experts
    return _hf_llama_ends() + repeat(block, "model.layers.{}.")


def hf_gpt_oss():
    """transformers, models/gpt_oss/modeling_gpt_oss.py: fused (expert, in, out) stacks.

    The same expert names as in Mixtral of transformers 5 with the transposed layout, 2-D expert
    biases and a vector of attention sinks.
    """
    block = (
        _hf_llama_attention(qkv_bias=True)
        + [
            ad("self_attn.o_proj.bias", D),
            ad("self_attn.sinks", H),
            mu("mlp.experts.gate_up_proj", (E, D, 2 * F), (1,), (2,)),
            ad("mlp.experts.gate_up_proj_bias", E, 2 * F),
            mu("mlp.experts.down_proj", (E, F, D), (1,), (2,)),
            ad("mlp.experts.down_proj_bias", E, D),
        ]
        + _hf_linear("mlp.router", E, D, True)
    )
    return _hf_llama_ends() + repeat(block, "model.layers.{}.")


def _hf_deepseek(experts):
    a = "self_attn."
    attention = (
        _hf_linear(a + "q_a_proj", QL, D)
        + [ad(a + "q_a_layernorm.weight", QL)]
        + _hf_linear(a + "q_b_proj", H * (NOPE + ROPE), QL)
        + _hf_linear(a + "kv_a_proj_with_mqa", KL + ROPE, D)
        + [ad(a + "kv_a_layernorm.weight", KL)]
        + _hf_linear(a + "kv_b_proj", H * (NOPE + VH), KL)
        + _hf_linear(a + "o_proj", D, H * VH)
        + _hf_llama_norms()
    )
    moe = (
        attention
        + _hf_linear("mlp.gate", E, D)
        + [ad("mlp.gate.e_score_correction_bias", E)]
        + _hf_llama_mlp("mlp.shared_experts.", FS)
        + experts
    )
    return (
        _hf_llama_ends()
        + repeat(attention + _hf_llama_mlp(), "model.layers.{}.", LD)
        + repeat(moe, "model.layers.{}.", 2, start=LD)
    )


def hf_deepseek_v3():
    """transformers, models/deepseek_v3/modeling_deepseek_v3.py, per-expert hub naming."""
    return _hf_deepseek([r for e in range(E) for r in _hf_llama_mlp(f"mlp.experts.{e}.", FM)])


def hf_deepseek_v3_v5():
    """transformers 5, models/deepseek_v3/modeling_deepseek_v3.py: fused (expert, out, in)."""
    return _hf_deepseek(
        [
            mu("mlp.experts.gate_up_proj", (E, 2 * FM, D), (2,), (1,)),
            mu("mlp.experts.down_proj", (E, D, FM), (2,), (1,)),
        ]
    )


# --- Hugging Face, Flax -----------------------------------------------------------------------


def _flax_dense(path, out, inp, bias=False):
    rows = [io(path + "/kernel", (inp,), (out,))]
    return rows + ([ad(path + "/bias", out)] if bias else [])


def _flax_norm(path):
    return [ad(path + "/scale", D), ad(path + "/bias", D)]


def hf_flax_gpt2():
    """transformers 4, models/gpt2/modeling_flax_gpt2.py, untied head.

    FlaxConv1D creates its kernel as (features, inputs) and transposes it when called, so these
    kernels are output first, against the torch Conv1D and against every other Flax kernel.
    """

    def conv1d(path, out, inp):
        return [oi(path + "/kernel", (out,), (inp,)), ad(path + "/bias", out)]

    block = (
        _flax_norm("ln_1")
        + conv1d("attn/c_attn", 3 * D, D)
        + conv1d("attn/c_proj", D, D)
        + _flax_norm("ln_2")
        + conv1d("mlp/c_fc", F, D)
        + conv1d("mlp/c_proj", D, F)
    )
    ends = [ad("transformer/wte/embedding", V, D), ad("transformer/wpe/embedding", P, D)]
    tail = _flax_norm("transformer/ln_f") + [ad("lm_head/kernel", D, V)]
    return ends + repeat(block, "transformer/h/{}/") + tail


def hf_flax_bert():
    """transformers 4, models/bert/modeling_flax_bert.py, FlaxBertForPreTraining with tied head."""
    t = "cls/predictions/"
    return (
        _hf_bert_body("/", _flax_dense, _flax_norm, "embedding")
        + _flax_dense(t + "transform/dense", D, D, True)
        + _flax_norm(t + "transform/LayerNorm")
        + [
            ad(t + "bias", V),
            ad("cls/seq_relationship/kernel", D, 2),
            ad("cls/seq_relationship/bias", 2),
        ]
    )


def hf_flax_llama():
    """transformers 4, models/llama/modeling_flax_llama.py: norm gains are called ``weight``."""
    a = "self_attn/"
    block = (
        _flax_dense(a + "q_proj", D, D)
        + _flax_dense(a + "k_proj", KV * DH, D)
        + _flax_dense(a + "v_proj", KV * DH, D)
        + _flax_dense(a + "o_proj", D, D)
        + _flax_dense("mlp/gate_proj", F, D)
        + _flax_dense("mlp/up_proj", F, D)
        + _flax_dense("mlp/down_proj", D, F)
        + [ad("input_layernorm/weight", D), ad("post_attention_layernorm/weight", D)]
    )
    return [
        ad("model/embed_tokens/embedding", V, D),
        ad("model/norm/weight", D),
        ad("lm_head/kernel", D, V),
    ] + repeat(block, "model/layers/{}/")


# --- T5X, big_vision --------------------------------------------------------------------------


def _t5x_block(cross, heads):
    def attention(name):
        rows = [io(f"{name}/{n}/kernel", (D,), heads) for n in ("query", "key", "value")]
        return rows + [io(f"{name}/out/kernel", heads, (D,))]

    if cross:
        rows = attention("self_attention") + attention("encoder_decoder_attention")
        norms = ["pre_self_attention_layer_norm", "pre_cross_attention_layer_norm"]
    else:
        rows, norms = attention("attention"), ["pre_attention_layer_norm"]
    rows += _maxtext_mlp() + [ad("pre_mlp_layer_norm/scale", D)]
    return rows + [ad(n + "/scale", D) for n in norms]


def _t5x_ends():
    return [
        ad("token_embedder/embedding", V, D),
        ad("encoder/encoder_norm/scale", D),
        ad("decoder/decoder_norm/scale", D),
        ad("decoder/logits_dense/kernel", D, V),
    ]


def t5x_t5():
    """T5X, examples/t5/{network,layers}.py: DenseGeneral stores kernels flattened to 2-D.

    The relative position table is (heads, buckets), the transpose of the torch one.
    """
    return (
        _t5x_ends()
        + [ad(s + "/relpos_bias/rel_embedding", H, R) for s in ("encoder", "decoder")]
        + repeat(_t5x_block(False, (H * K,)), "encoder/layers_{}/")
        + repeat(_t5x_block(True, (H * K,)), "decoder/layers_{}/")
    )


def t5x_scalable_t5_scan():
    """T5X, examples/scalable_t5/{network,layers}.py: param_scan_axis 1, heads kept apart.

    The scanned stack is called like its parent (``encoder/encoder``) and holds a relative
    position table per layer.
    """
    bias = [ad("relpos_bias/rel_embedding", H, R)]
    return (
        _t5x_ends()
        + insert_axis(_t5x_block(False, (H, K)) + bias, 1, prefix="encoder/encoder/")
        + insert_axis(_t5x_block(True, (H, K)) + bias, 1, prefix="decoder/decoder/")
    )


def _bv_attention(prefix):
    rows = []
    for n in ("query", "key", "value"):
        rows += [io(f"{prefix}/{n}/kernel", (D,), (H, DH)), ad(f"{prefix}/{n}/bias", H, DH)]
    return rows + [io(prefix + "/out/kernel", (H, DH), (D,)), ad(prefix + "/out/bias", D)]


def _bv_mlp(prefix):
    return _flax_dense(prefix + "/Dense_0", F, D, True) + _flax_dense(
        prefix + "/Dense_1", D, F, True
    )


def _bv_block():
    return (
        _flax_norm("LayerNorm_0")
        + _bv_attention("MultiHeadDotProductAttention_0")
        + _flax_norm("LayerNorm_1")
        + _bv_mlp("MlpBlock_0")
    )


def _bv_stem():
    return [
        ad("params/embedding/kernel", 7, 9, 5, D),
        ad("params/embedding/bias", D),
        ad("params/pos_embedding", 1, 15, D),
    ] + _flax_norm("params/Transformer/encoder_norm")


def big_vision_vit():
    """big_vision, models/vit.py, pool_type="tok", rep_size=True, scan=False.

    The patch embedding, a convolution called ``embedding``, counts as an embedding.
    """
    return (
        _bv_stem()
        + [ad("params/cls", 1, 1, D), ad("params/head/kernel", D, C), ad("params/head/bias", C)]
        + _flax_dense("params/pre_logits", D, D, True)
        + repeat(_bv_block(), "params/Transformer/encoderblock_{}/")
    )


def big_vision_vit_scan():
    """big_vision, models/vit.py, pool_type="map", scan=True: the layer axis is in front."""
    head = "params/MAPHead_0/"
    return (
        _bv_stem()
        + [ad("params/head/kernel", D, C), ad("params/head/bias", C), ad(head + "probe", 1, 1, D)]
        + _flax_norm(head + "LayerNorm_0")
        + _bv_attention(head + "MultiHeadDotProductAttention_0")
        + _bv_mlp(head + "MlpBlock_0")
        + insert_axis(_bv_block(), 0, prefix="params/Transformer/encoderblock/")
    )


# --- Gemma ------------------------------------------------------------------------------------


def _gemma_block(fused_qkv=False, out_first=False, qk_norm=False, post_norms=True, leaf="/w"):
    if fused_qkv:
        rows = [mu("attn/qkv_einsum" + leaf, (3, H, D, K), (2,), (1, 3))]
    else:
        rows = [
            mu("attn/q_einsum" + leaf, (H, D, K), (1,), (0, 2)),
            mu("attn/kv_einsum" + leaf, (2, KV, D, K), (2,), (1, 3)),
        ]
    rows.append(io("attn/attn_vec_einsum" + leaf, (H, K), (D,)))
    if qk_norm:
        rows += [ad("attn/_query_norm/scale", K), ad("attn/_key_norm/scale", K)]
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    norms += ["post_attention_norm", "post_ffw_norm"] if post_norms else []
    rows += [ad(n + "/scale", D) for n in norms]
    if out_first:
        gating = mu("mlp/gating_einsum", (2, F, D), (2,), (1,))
    else:
        gating = mu("mlp/gating_einsum", (2, D, F), (1,), (2,))
    return rows + [gating, io("mlp/linear", (F,), (D,))]


def gemma1_7b():
    """gemma, gm/nn/_modules.py without grouped queries: one fused (3, heads, in, head) qkv.

    The per-head output axis is split: fan-out is the axes on both sides of the input axis.
    """
    ends = [ad("embedder/input_embedding", V, D), ad("final_norm/scale", D)]
    return ends + repeat(_gemma_block(fused_qkv=True, post_norms=False), "layer_{}/")


def gemma2_2b():
    """gemma, gm/nn/{_modules,_gemma}.py: gating_einsum is (2, in, out)."""
    ends = [ad("embedder/input_embedding", V, D), ad("final_norm/scale", D)]
    return ends + repeat(_gemma_block(), "layer_{}/")


def gemma2_checkpoint():
    """gemma, gm/ckpts/_compat.py: the released naming, with a prefix and ``w`` on MLP leaves."""
    block = [(p + "/w" if p.startswith("mlp/") else p, *r) for p, *r in _gemma_block()]
    ends = [ad("embedder/input_embedding", V, D), ad("final_norm/scale", D)]
    rows = ends + repeat(block, "layer_{}/")
    return [("transformer/" + p, *rest) for p, *rest in rows]


def gemma3():
    """gemma, gm/nn/{_modules,_gemma}.py, also Gemma 2 9B and 27B (without the q/k norms).

    transpose_gating_einsum=True: gating_einsum is (2, out, in) under the very same name.
    """
    ends = [ad("embedder/input_embedding", V, D), ad("final_norm/scale", D)]
    return ends + repeat(_gemma_block(out_first=True, qk_norm=True), "layer_{}/")


def big_vision_gemma_scan():
    """big_vision, models/ppp/gemma.py as in PaliGemma (``llm``): scanned, layer axis in front."""
    ends = [ad("embedder/input_embedding", V, D), ad("final_norm/scale", D)]
    rows = ends + insert_axis(_gemma_block(post_norms=False), 0, prefix="layers/")
    return [("params/llm/" + p, *rest) for p, *rest in rows]


def flax_nnx_gemma():
    """flax, examples/gemma/{modules,transformer,layers}.py: einsum leaves are ``kernel``.

    Paths are those of ``nnx.state``, where each variable adds ``value`` at the end.
    """
    block = [r for r in _gemma_block(qk_norm=True, leaf="/kernel") if r[0][:4] != "mlp/"]
    block += _flax_dense("mlp/gate_proj", F, D) + _flax_dense("mlp/up_proj", F, D)
    block += _flax_dense("mlp/down_proj", D, F)
    ends = [ad("embedder/embedding", V, D), ad("final_norm/scale", D)]
    return suffix(ends + repeat(block, "layers/{}/"), "/value")


# --- Haiku, Equinox ---------------------------------------------------------------------------


def haiku():
    """dm-haiku, default module names; ``~`` marks a module made in a constructor.

    Linear w is (in, out), Conv w is (*spatial, in, out), norms hold scale and offset, BatchNorm
    keeps unit axes.
    """

    def linear(path, inp, out):
        return [io(path + "/w", (inp,), (out,)), ad(path + "/b", out)]

    a = "multi_head_attention/"
    return (
        [
            ad("embed/embeddings", V, D),
            ad("layer_norm/scale", D),
            ad("layer_norm/offset", D),
            ad("batch_norm/scale", 1, 1, 1, 20),
            ad("batch_norm/offset", 1, 1, 1, 20),
            io("conv1_d/w", (3, 20), (28,)),
            ad("conv1_d/b", 28),
            io("conv2_d/w", (3, 5, 12), (20,)),
            ad("conv2_d/b", 20),
        ]
        + [r for n in ("query", "key", "value") for r in linear(a + n, D, H * K)]
        + linear(a + "linear", H * K, D)
        + linear("mlp/~/linear_0", D, F)
        + linear("mlp/~/linear_1", F, D)
        + linear("linear", D, F)
        + linear("linear_1", F, D)
    )


def haiku_conv_transpose():
    """dm-haiku, conv.py, Conv2DTranspose: w is (*spatial, out, in)."""
    return [
        mu("conv2_d_transpose/w", (3, 5, 24, 12), (0, 1, 3), (2,)),
        ad("conv2_d_transpose/b", 24),
    ]


def _equinox_block():
    def linear(path, out, inp, bias=True):
        rows = [oi(path + "/weight", (out,), (inp,))]
        return rows + ([ad(path + "/bias", out)] if bias else [])

    return (
        [ad("norm/weight", D), ad("norm/bias", D)]
        + linear("attn/query_proj", H * K, D)
        + linear("attn/key_proj", H * K, D)
        + linear("attn/value_proj", H * VH, D)
        + linear("attn/output_proj", D, H * VH)
        + linear("mlp/layers/0", F, D)
        + linear("mlp/layers/1", D, F)
    )


def equinox():
    """equinox, nn: Embedding, LayerNorm, MultiheadAttention, MLP, Conv2d in a list of blocks.

    Every array is called weight or bias and a path shows field names only, not module types;
    conv weights are (out, in, *spatial) and conv biases (out, 1, 1).
    """
    return [
        ad("embedding/weight", V, D),
        oi("conv/weight", (20,), (12, 3, 5)),
        ad("conv/bias", 20, 1, 1),
        ad("head/weight", C, D),
        ad("head/bias", C),
    ] + repeat(_equinox_block(), "blocks/{}/")


def equinox_vmapped():
    """equinox, blocks built with filter_vmap: the layer axis in front, norm gains become 2-D."""
    ends = [ad("embedding/weight", V, D), ad("head/weight", C, D), ad("head/bias", C)]
    return ends + insert_axis(_equinox_block(), 0, prefix="blocks/")


FAMILIES = {
    f.__name__: f
    for f in (
        maxtext_llama_scan,
        maxtext_llama_unscanned,
        maxtext_mixtral_scan,
        maxtext_mixtral_unscanned,
        maxtext_deepseek_scan,
        maxtext_gpt3_scan,
        levanter_llama,
        levanter_llama_unscanned,
        levanter_mixtral,
        levanter_gpt2,
        hf_gpt2,
        hf_llama,
        hf_qwen2,
        hf_qwen3,
        hf_bert,
        hf_bert_classifier,
        hf_t5,
        hf_mixtral,
        hf_mixtral_v5,
        hf_qwen3_moe,
        hf_gpt_oss,
        hf_deepseek_v3,
        hf_deepseek_v3_v5,
        hf_flax_gpt2,
        hf_flax_bert,
        hf_flax_llama,
        t5x_t5,
        t5x_scalable_t5_scan,
        big_vision_vit,
        big_vision_vit_scan,
        gemma1_7b,
        gemma2_2b,
        gemma2_checkpoint,
        gemma3,
        big_vision_gemma_scan,
        flax_nnx_gemma,
        haiku,
        haiku_conv_transpose,
        equinox,
        equinox_vmapped,
    )
}
