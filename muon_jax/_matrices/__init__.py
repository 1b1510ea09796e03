"""A leaf and its matrices: stacks, heads, fused projections and blocks, and what is done to each.

`parts` splits a leaf into matrices of one shape and merges them again; `stages` applies momentum,
orthogonalisation and shape scale to them, for Muon and every variant.
"""
