"""What the tests measure against, for this library's tests and for those of kernels and models built on it.

* `brute_force`, `brute_force_selection`: the paper in plain loops, float64, one sequence;
  `sequences`: the same over batches, packed and ragged sequences.
* `input_families`: random, peaked, near-uniform, tied and correlated inputs.
* `comparison`: the error budget and the comparison of selections by score.
"""

from nsa.testing.comparison import assert_close_to_fp64, assert_same_selection
from nsa.testing.input_families import INPUT_FAMILIES, InputShape
from nsa.testing.sequences import Member, members, per_sequence

__all__ = [
    "INPUT_FAMILIES",
    "InputShape",
    "Member",
    "assert_close_to_fp64",
    "assert_same_selection",
    "members",
    "per_sequence",
]
