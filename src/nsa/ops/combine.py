"""The gated sum of the three branches (paper, eq. 5)."""

from jaxtyping import Float
from torch import Tensor

from nsa.shapes import bind


def combine(
    out_cmp: Float[Tensor, "b t h e"],
    out_slc: Float[Tensor, "b t h e"],
    out_win: Float[Tensor, "b t h e"],
    gates: Float[Tensor, "b t h 3"],
) -> Float[Tensor, "b t h e"]:
    """The output of the layer's attention.

        o_t = g_t^cmp o_t^cmp + g_t^slc o_t^slc + g_t^win o_t^win

    Args:
        out_cmp, out_slc, out_win: outputs of the branches.
        gates: one scalar per query, head and branch, in the order cmp, slc, win; in (0, 1) from a sigmoid.

    Returns:
        The sum, in the branches' dtype; zero where every branch is zero.

    Raises:
        ValueError: shapes that do not fit.

    Source: paper eq. 5.
    """
    bind(
        "combine",
        out_cmp=(out_cmp, "b t h e"),
        out_slc=(out_slc, "b t h e"),
        out_win=(out_win, "b t h e"),
        gates=(gates, "b t h 3"),
    )
    gate_cmp, gate_slc, gate_win = gates.to(out_cmp.dtype).unsqueeze(-1).unbind(-2)
    return gate_cmp * out_cmp + gate_slc * out_slc + gate_win * out_win
