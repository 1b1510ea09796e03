"""The orthogonal factor of a matrix.

`newton_schulz` chooses a form from `forms`, and `iteration` applies the odd polynomials of
`coefficients`, with the products of `symmetric` for symmetric results. `devices` predicts the time
of each form. `decompositions` applies exact decompositions to stacks.
"""
