"""The matrices of a leaf (stacks, heads, fused projections, blocks) and operations on them.

`parts` splits a leaf into matrices of one shape and merges them again. `stages` applies momentum,
orthogonalisation and shape scale to them, for Muon and every variant. `hooks` are user functions
that run between the stages.
"""
