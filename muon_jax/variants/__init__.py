"""Variants of Muon, one algorithm a file.

What their docstrings do not repeat:

- An optimizer, such as `normuon`, takes the learning rate of the hidden matrices (a number or a
  schedule), arguments of its own, and the options of `muon`. Its `update` requires `params`.
- Its `scale_by_` function is the part for trees of matrix stacks. It takes options of
  `scale_by_muon`, and its state has the class that the file defines.
- A hook, such as `snap_norm()`, goes to `before=` or `after=` of `muon` and its variants, and a
  constraint, such as `hyperball()`, to `constraint=`.
- A name that is unknown, a number out of range and axes that do not fit a leaf are a ValueError. A
  value of a wrong type is a TypeError, and so is an array that decides what is compiled.
"""
