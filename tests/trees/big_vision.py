"""big_vision: models/vit.py.

The patch embedding, a convolution called `embedding`, counts as an embedding. Without a scan
pool_type="tok" and rep_size=True, with one pool_type="map".
"""

from trees.text import rows, scan

STEM = """
embedding/kernel     7 9 5 D  -
embedding/bias       D        -
pos_embedding        1 15 D   -
Transformer/encoder_norm/{scale,bias}  D  -
head/kernel          D C      -
head/bias            C        -
"""
TOKEN = """
cls                1 1 D  -
pre_logits/kernel  D D    io
pre_logits/bias    D      -
"""
BLOCK = """
LayerNorm_0/{scale,bias}  D  -
MultiHeadDotProductAttention_0/{query,key,value}/kernel  D H DH  ioo
MultiHeadDotProductAttention_0/{query,key,value}/bias    H DH    -
MultiHeadDotProductAttention_0/out/kernel                H DH D  iio
MultiHeadDotProductAttention_0/out/bias                  D       -
MlpBlock_0/Dense_0/kernel  D F  io
MlpBlock_0/Dense_0/bias    F    -
MlpBlock_0/Dense_1/kernel  F D  io
MlpBlock_0/Dense_1/bias    D    -
"""
NORM = "LayerNorm_1/{scale,bias}  D  -\n"
PROBE = "probe  1 1 D  -\n"
FAMILIES = {
    "big_vision_vit": rows(STEM + TOKEN, "params/")
    + rows(BLOCK + NORM, "params/Transformer/encoderblock_{0-4}/"),
    "big_vision_vit_scan": rows(STEM, "params/")
    + rows(PROBE + BLOCK, "params/MAPHead_0/")
    + scan("params/Transformer/encoderblock/", BLOCK + NORM),
}
