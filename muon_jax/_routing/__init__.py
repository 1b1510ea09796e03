"""Which optimizer takes which leaf, and along which axes a leaf is a matrix.

The user's rules decide first (`rules`). If the model was traced, its use of a leaf decides next
(`use`, with the interpreter of the jaxpr in `trace`). Otherwise the words of the leaf's path
(`names`), the axes of its kernel (`axes`) and the rest of the tree (`survey`, `ends`) decide.
"""
