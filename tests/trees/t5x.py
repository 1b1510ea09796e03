"""T5X: examples/{t5,scalable_t5}/{network,layers}.py.

DenseGeneral of t5 stores kernels flattened to 2-D. In scalable_t5 heads are kept apart, and the
scanned stack, with a relative position table (heads, buckets) a layer, is called like its parent.
"""

from trees.text import rows, scan

ENDS = """
token_embedder/embedding                       V D  -
{encoder/encoder_norm,decoder/decoder_norm}/scale  D    -
decoder/logits_dense/kernel                    D V  -
"""
TABLES = "{encoder,decoder}/relpos_bias/rel_embedding  H R  -\n"
TABLE = "relpos_bias/rel_embedding  H R  -\n"
ENCODER = """
pre_{attention,mlp}_layer_norm/scale  D  -
attention/{query,key,value}/kernel  D H K  ioo
attention/out/kernel                H K D  iio
mlp/wi_{0,1}/kernel                 D F    io
mlp/wo/kernel                       F D    io
"""
DECODER = """
pre_{self_attention,cross_attention,mlp}_layer_norm/scale  D  -
{self_attention,encoder_decoder_attention}/{query,key,value}/kernel  D H K  ioo
{self_attention,encoder_decoder_attention}/out/kernel                H K D  iio
mlp/wi_{0,1}/kernel  D F  io
mlp/wo/kernel        F D  io
"""


def flattened(block):
    return block.replace("H K", "H*K").replace("ioo", "io").replace("iio", "io")


FAMILIES = {
    "t5x_t5": rows(ENDS + TABLES)
    + rows(flattened(ENCODER), "encoder/layers_{0-4}/")
    + rows(flattened(DECODER), "decoder/layers_{0-4}/"),
    "t5x_scalable_t5_scan": rows(ENDS)
    + scan("encoder/encoder/", ENCODER + TABLE, 1)
    + scan("decoder/decoder/", DECODER + TABLE, 1),
}
