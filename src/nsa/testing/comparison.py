"""When two results count as equal: an error budget taken from the data, never a tolerance set by hand.

An implementation in some dtype may differ from the float64 truth by at most twice what plain PyTorch in that
dtype does, plus the rounding of the result itself. Selections are compared by the scores of what they
selected, because near-ties may fall either way.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig


def assert_close_to_fp64(
    actual: Tensor, plain: Tensor, truth: Tensor, name: str = "result", *, largest_score: float = 0.0
) -> None:
    """The error of `actual` against `truth` is within the budget that `plain` sets.

        max |actual - truth| <= 2 max |plain - truth| + (eps + eps32 * largest_score) max |truth|

    and the same for the root mean squares. The budget is as good as the number of errors that it is taken from: those
    of a single number that sums up many, such as a loss in bf16, cancel by chance, in `plain` as in `actual`. Judge
    what it is the sum of.

    Args:
        actual: the result to judge.
        plain: the same computed by plain PyTorch in the same dtype.
        truth: the same in float64.
        name: what to call it in the message.
        largest_score: for what comes out of a softmax, the largest size of the exponentials' argument. Accumulated
            in float32 (float64 for float64) it is rounded by eps32 times itself, and so is the result.

    Infinities (the lse of empty rows) must be where the truth has them; NaN never passes.

    Raises:
        AssertionError: one line with both errors, the budget, and the worst element.
    """
    shapes = [list(tensor.shape) for tensor in (actual, plain, truth)]
    assert shapes[0] == shapes[1] == shapes[2], f"{name}: shapes differ: actual, plain, truth are {shapes}"
    assert truth.dtype == torch.float64, f"{name}: the truth should be float64, got {truth.dtype}"
    assert actual.dtype == plain.dtype, f"{name}: dtypes differ: actual {actual.dtype}, plain {plain.dtype}"
    accumulated = torch.promote_types(actual.dtype, torch.float32)
    rounding = torch.finfo(actual.dtype).eps + torch.finfo(accumulated).eps * largest_score
    actual, plain, truth = (x.detach().to("cpu", torch.float64) for x in (actual, plain, truth))
    for label, x in (("actual", actual), ("plain", plain), ("truth", truth)):
        assert not x.isnan().any(), f"{name}: {int(x.isnan().sum())} of {x.numel()} elements of {label} are NaN"
    infinite = truth.isinf()
    for label, x in (("actual", actual), ("plain", plain)):
        misplaced = (x.isinf() | infinite) & (x != truth)
        assert not misplaced.any(), f"{name}: {int(misplaced.sum())} infinities of {label} differ from the truth's"
    actual, plain, truth = actual[~infinite], plain[~infinite], truth[~infinite]
    if truth.numel() == 0:
        return
    error, plain_error = (actual - truth).abs(), (plain - truth).abs()
    for norm, measure in (("largest", torch.amax), ("root mean square", _root_mean_square)):
        got, allowed = (
            float(measure(error)),
            float(2 * measure(plain_error) + rounding * measure(truth.abs())),
        )
        worst = int(error.argmax())
        assert got <= allowed, (
            f"{name}: {norm} error {got:.3g} exceeds the budget {allowed:.3g} (twice plain PyTorch's "
            f"{float(measure(plain_error)):.3g} plus rounding); "
            f"worst element: got {float(actual[worst]):.9g}, truth {float(truth[worst]):.9g}"
        )


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def assert_same_selection(
    block_indices: Int[Tensor, "b t g n"],
    scores: Float[Tensor, "b t g blocks"],
    positions: Int[Tensor, "b t"],
    config: NSAConfig,
    *,
    plain_scores: Float[Tensor, "b t g blocks"],
) -> None:
    """`block_indices` is right by the float64 `scores`, up to the rounding of the dtype under test.

    Checked exactly: n slots, ascending without repeats, -1 last, as many blocks as there are (at most n),
    none after the query's own, the forced ones among them. Checked by score: the picks that are not forced,
    from the best on, score as high as the best possible ones, less twice the largest error of `plain_scores`
    (the same scores by plain PyTorch in the dtype under test) and their rounding. Which of two blocks with
    one score was picked is not judged here.

    Args:
        block_indices: what was selected.
        scores: eq. 10 in float64, of every block.
        positions: of the queries in their sequences; negative for padding, which selects nothing.
        config: block size and counts.
        plain_scores: as above; pass what the selection was made from.

    Raises:
        AssertionError: one line that names the rule and the first query that breaks it.
    """
    assert scores.dtype == torch.float64, f"scores should be float64, got {scores.dtype}"
    rounding = torch.finfo(plain_scores.dtype).eps
    indices, scores, positions, plain_scores = (
        x.detach().cpu() for x in (block_indices.long(), scores, positions, plain_scores.double())
    )
    n, num_blocks = config.num_selected_blocks, scores.shape[-1]
    assert indices.shape[-1] == n, f"expected {n} slots a query, got {indices.shape[-1]}"
    _require(~scores.isnan().any(-1) & ~plain_scores.isnan().any(-1), "scores are not NaN", indices)

    filled = indices >= 0
    own = positions.div(config.select_block_size, rounding_mode="floor")[:, :, None, None]
    _require((filled[..., :-1] >= filled[..., 1:]).all(-1), "-1 comes last", indices)
    _require((indices >= -1).all(-1), "an empty slot is -1", indices)
    ascending = (indices[..., 1:] > indices[..., :-1]) | ~filled[..., 1:]
    _require(ascending.all(-1), "blocks ascend without repeats", indices)
    _require((indices <= own).all(-1) | (positions < 0)[..., None], "no block after the query's own", indices)
    _require((filled.sum(-1, keepdim=True) == (own + 1).clamp(0, n)).all(-1), "as many blocks as exist", indices)

    block = torch.arange(num_blocks)
    chosen = torch.zeros(*indices.shape[:-1], num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, indices.where(filled, num_blocks), True)
    chosen = chosen[..., :num_blocks]
    candidates = block <= own
    forced = candidates & ((block < config.num_initial_blocks) | (block > own - config.num_local_blocks))
    _require((chosen | ~forced).all(-1), "forced blocks are selected", indices)

    budget = 2 * (plain_scores - scores).abs().amax() + rounding * scores.abs().amax() if scores.numel() else 0.0
    best = scores.masked_fill(~candidates | forced, -torch.inf).sort(dim=-1, descending=True).values
    picked = scores.masked_fill(~chosen | forced, -torch.inf).sort(dim=-1, descending=True).values
    rule = f"free picks score as high as the best, within {budget:.3g}"
    _require(((picked >= best - budget) | (picked == -torch.inf)).all(-1), rule, indices)


def _require(holds: Tensor, rule: str, indices: Tensor) -> None:
    holds = holds.expand(indices.shape[:-1])
    if not holds.all():
        first = tuple((~holds).nonzero()[0].tolist())
        raise AssertionError(
            f"selection: '{rule}' fails for {int((~holds).sum())} of {holds.numel()} queries; the first, "
            f"[b, t, g] = {list(first)}, selected {indices[first].tolist()}"
        )
