"""Which optimizer takes which leaf, and along which axes a leaf is a matrix.

The user's rules decide first (`rules`), then what the model does with a leaf, where it was traced
(`use`, and `trace` for the interpreter of its jaxpr), then the words of its path (`names`), the
axes of its kernel (`axes`), and what only the whole tree shows (`survey`, `ends`).
"""
