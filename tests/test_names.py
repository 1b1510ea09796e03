"""What names, shapes and neighbours tell of a leaf: one row for each kind that real trees have.

An expectation is one letter an axis (i: fan_in, o: fan_out, b: batch) for a hidden matrix and `-`
for AdamW, with a `?` behind it where the routing must say that it guesses.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from test_routing import nested, routes_by_path
from trees import FAMILIES

import muon_jax

# A kind, its leaves and their shapes, and the expectation of each.
ROWS = """
# Witnesses of scans
a conv bias is no scan | a/weight 24×12×3; a/bias 24×1 | oii -
a linear and a conv bias | c/weight 24×12×3; c/bias 24×1; d/weight 24×7; d/bias 24×1 | oii - oi -
a LoRA rank as large as the heads | a/lora_b 4×32; a/q_norm/scale 4×8; a/o/kernel 4×8×32 | io - iio?
gains of weight norm | a/weight_g 24×1; a/weight_v 24×16 | - oi
biases of an einsum | up/kernel 4×16×24; up/bias 4×24 | bio? -
a recurrent bias | gru/kernel 16×96; gru/recurrent_kernel 32×96; gru/bias 2×96 | io io -
two scans | n/scale 3×5×16; up/kernel 3×5×16×24; q/kernel 3×5×16×2×8 | - bbio bbioo
a scan of one module | layers/kernel 5×16×24; layers/bias 5×24 | bio -

# Convolutions
a patch embedding | patch_embed/proj/kernel 14×14×3×64 | -
flattened patches | patch_embed/proj/kernel 588×64 | -
a video's patches | patch_embed/proj/kernel 2×16×16×3×64 | -
a projection of patches | pos_embeddings/projection/kernel 16×16×3×64 | -
a stem | embedding_layer/layers/0/kernel 4×4×3×64 | -
a patch embedding of torch | stem/weight 64×3×16×16 | -
a large window | body/kernel 16×16×32×64 | iiio?
depthwise, in one dimension | conv1d/kernel 4×1×64 | -
depthwise | dwconv/kernel 7×7×1×64 | -
depthwise of Keras | depthwise_conv2d/kernel 3×3×64×1 | -
depthwise of torch | mixer/conv1d/weight 64×1×4; mixer/conv1d/bias 64 | - -
transposed, by Keras | conv2d_transpose/kernel 3×3×24×12 | iioi
transposed, by Flax | ConvTranspose_0/kernel 3×3×24×12 | iiio
transposed, by its bias | dec_1/w 4×4×32×8; dec_1/b 32 | iioi -
experts are no windows | mlp/w1 4×3×16×32; ffn/w2 4×3×32×16 | bbio? bbio?
a projection back to an image | conv_out/kernel 3×3×64×3 | -?

# Heads, critics and what is none
a compound name | decoder/logitdense/kernel 16×50 | -
an output projection | output_projection/kernel 16×50; norm/scale 16 | - -
an output projection of torch | output_proj.weight 50×16; norm/scale 16 | - -
an output projection of attention | attn/output_proj/kernel 24×16; norm/scale 16 | io -
fc | fc/weight 10×16; a/up/weight 24×16; a/down/weight 16×24 | - oi oi
linear | linear/kernel 16×9; a/up/kernel 16×24; a/wo/kernel 24×16 | - io io
a classifier's | classifier/kernel 16×10 | -
named by its parent |
    class_head/Dense_0/kernel 16×10; a/up/kernel 16×24; a/wo/kernel 24×16 | - io io
named by its grandparent's softmax | softmax/logits_ffn/linear/kernel 16×50 | -
a critic | value/kernel 16×3 | -?
a baseline | baseline/w 16×3 | -?
values of actions | q_values/kernel 16×4 | -?
one output | mlp/Dense_3/kernel 16×1 | -
values of an attention | mix/value/kernel 16×4; mix/key/kernel 16×4 | io io
router logits | mlp/router_logits/kernel 16×4 | io
altup | altup_unembed_projection/kernel 16×16 | io
readout | readout/kernel 16×10 | -
actions | action_out_proj/kernel 16×7 | -?
a policy | policy/kernel 16×6 | -?
a reward | reward/kernel 16×8 | -?
a connector | img/head/kernel 12×16; img/norm/scale 12; llm/norm/scale 16 | io? - -
a pooler's head | MAPHead_0/MlpBlock_0/Dense_0/kernel 16×64 | io

# Names of torch, LoRA, biases
a torch cell | cell/weight_hh 96×32; cell/weight_ih 96×16; cell/bias 96 | oi oi -
LoRA | q/lora/a 16×4; q/lora/b 4×16; q/kernel 16×16 | io io io
LoRA of torch | q/lora_A/weight 4×16; q/lora_B/weight 16×4 | oi oi
LoRA of heads | attn_vec/lora/a 4×8×2; attn_vec/lora/b 2×16 | iio io
LoRA of a fused stack | kv_einsum/lora_a 5×2×1×16×4; kv_einsum/lora_b 5×2×1×4×8 | bbbio bbbio
LoRA of qwix | kv/kernel_lora_a 16×4; kv/kernel_lora_b 4×2×1×8 | io iooo
biases of heads | attn/b_Q 4×8; attn/W_Q 4×16×8; attn/b_O 16 | - oio? -
a suffix | mlp/fc1_b 3×24; mlp/fc1_w 3×16×24 | - bio
MLA is no bias | attn/kv_a 16×6; attn/kv_b 6×24 | io io

# Vectors and elementwise leaves
unit axes | x/kernel 1×1×16; y/kernel 16×1; z/weight 1×16 | - - -
states of a scan | mixer/A_log 32×16; mixer/D 32 | - -
mixing of tokens | att/time_mix_k 1×1×16; att/time_decay 4×4 | - -
elementwise | a/kernel_sigma 8×24; a/diag_kernel 16×16; a/alpha 4×16 | - - -
relative biases | attn/relative_position_bias_table 49×4; attn/rel_pos_h 13×8 | - -
tables | hash_table 512×2; object_queries 100×16; embeddings/data_array 50×16 | - - -

# Kernels of many axes
a DenseGeneral of unknown name | foo/kernel 16×2×8 | ioo?
and back | bar/kernel 2×8×16 | iio?
told by its bias | foo/kernel 16×2×6; foo/bias 2×6 | ioo -
a layer's projections | per_layer_projection/kernel 64×5×8 | ioo?
experts by their router | ffn/w1 4×16×24; ffn/w2 4×24×16; ffn/router/kernel 16×4 | bio bio io
an attention in a mixture | moe_layers/attention/query/kernel 16×2×8; norm/scale 16 | ioo -
gains of heads are no widths |
    attn/q_norm/scale 8; attn/out/kernel 8×24; attn/query/kernel 24×8 | - io io

# Names of libraries
TransformerLens | embed/W_E 50×16; unembed/W_U 16×50; pos_embed/W_pos 9×16 | - - -
fairseq | encoder.layers.0.fc1.weight 64×16; decoder.embed_tokens.weight 50×16 | oi -
RWKV | ffn/key/weight 64×16; ffn/value/weight 16×64; ln/weight 16 | oi oi -
Mamba | mixer/x_proj/weight 36×64; mixer/dt_proj/weight 64×4 | oi oi
irreps | linear/w[0,0] 1o,1o 8×16; norm/scale 8 | io -
adaptive norms | adaLN_modulation/1/weight 96×16 | oi

# First and last matrices without a name
an MLP | hidden_0/kernel 9×16; hidden_1/kernel 16×16; hidden_2/kernel 16×5 | -? io -?
an autoencoder |
    fc1/kernel 99×16; fc2/kernel 16×4; fc3/kernel 4×16; fc4/kernel 16×99 | io? io io io?
a policy's last |
    policy/hidden_0/kernel 16×16; policy/hidden_1/kernel 16×16; policy/hidden_2/kernel 16×5 |
    io? io -
"""


def kinds(rows):
    """The shapes by path and the expectation of each kind; a line that is indented continues."""
    found = {}
    for line in re.sub(r"\n    ", " ", rows).splitlines():
        if line and not line.startswith("#"):
            kind, leaves, expected = line.split(" | ")
            pairs = [leaf.rsplit(" ", 1) for leaf in leaves.split("; ")]
            shapes = {path: tuple(map(int, shape.split("×"))) for path, shape in pairs}
            found[kind] = shapes, expected
    return found


KINDS = kinds(ROWS)

NAMELESS = {
    "a Keras value list": ([(50, 16), (16, 24), (24,), (24, 16), (16,)], 3),
    "stax": ([((3, 3, 12, 32), (1, 1, 1, 32)), (), ((512, 24), (24,))], 2),
    "an unknown name": ({"square": (8, 8), "bias": (8,)}, 1),
}


def spelled(leaf):
    if leaf.label == "other":
        return "-" + "?" * bool(leaf.doubt)
    batch, fan_in, fan_out = leaf.axes.split(leaf.shape)
    letters = dict.fromkeys(batch, "b") | dict.fromkeys(fan_in, "i") | dict.fromkeys(fan_out, "o")
    return "".join(letters[axis] for axis in sorted(letters)) + "?" * bool(leaf.doubt)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_real_trees(kind):
    shapes, expected = KINDS[kind]
    found = routes_by_path(nested(shapes))
    assert " ".join(spelled(found[path]) for path in shapes) == expected


def test_the_reason_says_that_a_factor_is_one_of_lora():
    found = routes_by_path(nested({"q/lora_a": (16, 4), "q/lora_b": (4, 16), "q/kernel": (16, 16)}))
    told = {path for path, leaf in found.items() if leaf.why.startswith("a LoRA factor")}
    assert told == {"q/lora_a", "q/lora_b"}


def structs(shapes):
    def is_shape(x):
        return isinstance(x, tuple) and x != () and all(isinstance(size, int) for size in x)

    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)


@pytest.mark.parametrize("optimizer", [muon_jax.muon, muon_jax.scion])
@pytest.mark.parametrize("tree", NAMELESS)
def test_init_warns_once_of_the_leaves_that_are_guesses(tree, optimizer):
    shapes, guesses = NAMELESS[tree]
    params = structs(shapes)
    with pytest.warns(UserWarning, match="guesses from their names") as caught:
        jax.eval_shape(optimizer(0.1).init, params)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "routing=" in text and "trace_routing" in text and "routing_table" in text
    named = [leaf for leaf in routes_by_path(params).values() if leaf.doubt]
    assert len(named) >= guesses
    assert all(f"{leaf.path} ({leaf.label}: {leaf.doubt})" in text for leaf in named)


def test_init_is_silent_for_known_names_and_where_the_user_decides():
    square = structs({"square": (8, 8)})
    llama = nested({path: shape for path, shape, *_ in FAMILIES["maxtext_llama_scan"]()})
    cases = [
        (llama, {}),
        (square, {"routing": [("square", muon_jax.MatrixAxes())]}),
        (square, {"routing": [("square", "other")]}),
        (square, {"routing": [("square", "muon")]}),
        (square, {"matrix_axes": {"square": muon_jax.MatrixAxes()}}),
    ]
    for params, options in cases:
        with warnings.catch_warnings(action="error"):
            jax.eval_shape(muon_jax.muon(0.1, **options).init, params)
