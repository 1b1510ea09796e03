"""An abstract interpreter that follows the leaves of a tree through a jaxpr to their uses.

`tracer` runs a jaxpr on the abstract values of `values`. The table `primitives` has a handler for
each primitive, from `arrays`, `products` and `programs`. `leaf_axes` maps the axes of an array to
those of a leaf.
"""
