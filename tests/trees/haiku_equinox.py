"""Haiku and Equinox.

Haiku has default module names; `~` marks a module made in a constructor. BatchNorm keeps unit
axes. All arrays of Equinox are weight or bias, below names of fields and not of modules. Blocks
are in a list, or made by filter_vmap.
"""

from trees.text import rows, scan

HAIKU = """
embed/embeddings           V D        -
layer_norm/{scale,offset}  D          -
batch_norm/{scale,offset}  1 1 1 20   -
conv1_d/w                  3 20 28    iio
conv1_d/b                  28         -
conv2_d/w                  3 5 12 20  iiio
conv2_d/b                  20         -
multi_head_attention/{query,key,value}/w  D H*K  io
multi_head_attention/{query,key,value}/b  H*K    -
multi_head_attention/linear/w             H*K D  io
multi_head_attention/linear/b             D      -
{mlp/~/linear_0,linear}/w    D F  io
{mlp/~/linear_0,linear}/b    F    -
{mlp/~/linear_1,linear_1}/w  F D  io
{mlp/~/linear_1,linear_1}/b  D    -
"""
TRANSPOSED = """
conv2_d_transpose/w  3 5 24 12  iioi
conv2_d_transpose/b  24         -
"""
ENDS = """
embedding/weight  V D  -
head/weight       C D  -
head/bias         C    -
"""
CONV = """
conv/weight  20 12 3 5  oiii
conv/bias    20 1 1     -
"""
BLOCK = """
norm/{weight,bias}              D       -
attn/{query,key}_proj/weight    H*K D   oi
attn/{query,key}_proj/bias      H*K     -
attn/value_proj/weight          H*VH D  oi
attn/value_proj/bias            H*VH    -
attn/output_proj/weight         D H*VH  oi
attn/output_proj/bias           D       -
mlp/layers/0/weight             F D     oi
mlp/layers/0/bias               F       -
mlp/layers/1/weight             D F     oi
mlp/layers/1/bias               D       -
"""
FAMILIES = {
    "haiku": rows(HAIKU),
    "haiku_conv_transpose": rows(TRANSPOSED),
    "equinox": rows(ENDS + CONV) + rows(BLOCK, "blocks/{0-4}/"),
    "equinox_vmapped": rows(ENDS) + scan("blocks/", BLOCK),
}
