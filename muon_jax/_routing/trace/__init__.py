"""An abstract interpreter: follows the leaves of a tree through a jaxpr to their uses.

`tracer` runs a jaxpr on `values`; `primitives` is the table of what each primitive does, in
`arrays`, `products` and `programs`; `leaf_axes` tells which axes of a leaf an array's axes are.
"""
