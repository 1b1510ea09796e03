"""The orthogonal factor of a matrix.

`newton_schulz` chooses a form and has `iteration` apply the odd polynomials of `coefficients`, with
the products of `symmetric` where a result is symmetric; `decompositions` are the exact ones, by
LAPACK.
"""
