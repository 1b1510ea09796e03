"""Orthogonalises every matrix of a tree only once, on any mesh.

`layout` finds the mesh axes that split a leaf, `buckets` groups its matrices by shape, `assignment`
gives each device its share, `exchange` moves them there and back, and `placement` does all of this
for a tree. `auto_axes`, `explicit_axes` and `match_sharding` handle the kinds of mesh axes.
"""
