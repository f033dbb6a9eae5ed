"""Static and paged caches give what the growing cache gives, refuse what they cannot hold, and share what is shared."""

import pytest
import torch

from nsa import NSACache, NSAConfig
from nsa.cache import CacheViews, LayerCache, PagedNSACache, StaticNSACache, convert
from nsa.streams import Branches

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=6)
SHARED = NSAConfig.from_dict({**CONFIG.to_dict(), "shared_kv": True})
LAYOUTS = ("growing", "static", "paged")
PAGE = 16


def new_cache(layout: str, config: NSAConfig = CONFIG, room: int = 640, max_crop: int = 3) -> LayerCache:
    if layout == "growing":
        return NSACache(config, max_crop=max_crop)
    if layout == "static":
        return StaticNSACache(config, room, max_crop=max_crop, max_new=4)
    return PagedNSACache(config, room // PAGE * 4, page_size=PAGE, max_length=room, max_crop=max_crop, max_new=4)


def mean_run(k, v, first):
    """phi = mean; the first block's index is added to the key, so that a wrong one shows."""
    k, v = (x.unfold(1, 8, 4).mean(-1) for x in (k, v))
    return k + torch.arange(first, first + k.shape[1]).view(1, -1, 1, 1), v


def append(cache, x, counts=None):
    """All branches hold the same tokens x [b, t], two heads of width 1; values are negated."""
    k = torch.stack([x, x * 3], dim=-1)[..., None]
    return CacheViews.of(cache.update(Branches.of_tokens(k, -k, k, -k, k, -k), mean_run, counts=counts))


def assert_remembers(cache, views, tokens: list[list[float]], new: list[int]) -> None:
    """The views of every branch, by hand, for rows of tokens of which the last new[r] have just come."""
    assert cache.lengths == [len(row) for row in tokens]
    for row, known in enumerate(tokens):
        x = torch.tensor(known, dtype=torch.float64)
        for head, factor in enumerate((1, 3)):
            assert views.k[row, : len(x), head, 0].tolist() == (x * factor).tolist()
            assert views.v[row, : len(x), head, 0].tolist() == (-x * factor).tolist()
            blocks = [x[i * 4 : i * 4 + 8].mean() * factor for i in range(CONFIG.num_compressed_blocks(len(x)))]
            truth = torch.tensor(blocks, dtype=torch.float64)
            torch.testing.assert_close(views.k_cmp[row, : len(truth), head, 0], truth + torch.arange(len(truth)))
            torch.testing.assert_close(views.v_cmp[row, : len(truth), head, 0], -truth)
            near = views.k_win.shape[1] if views.seqlens_win is None else int(views.seqlens_win[row])
            assert near >= min(len(x), new[row] + CONFIG.window_size - 1)
            assert views.k_win[row, :near, head, 0].tolist() == (x * factor)[len(x) - near :].tolist()
        if views.seqlens_k is not None:
            assert int(views.seqlens_k[row]) == len(x)


@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunks", [[50], [1] * 50, [7, 1, 30, 12], [8, 42], [0, 3, 47], [16, 16, 16, 2], [15, 1, 34]])
def test_views_hold_every_token_of_every_branch_whatever_the_chunks(layout, config, chunks):
    tokens = torch.randn(2, 50, dtype=torch.float64)
    cache, done = new_cache(layout, config), 0
    for chunk in chunks:
        views = append(cache, tokens[:, done : done + chunk])
        done += chunk
        assert_remembers(cache, views, tokens[:, :done].tolist(), [chunk, chunk])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("around", [PAGE, 2 * PAGE, 256, 512])
def test_every_length_around_page_boundaries_whole_and_token_by_token(layout, around):
    tokens = torch.randn(1, around + 12, dtype=torch.float64)
    stepped = new_cache(layout)
    append(stepped, tokens[:, : around - 9])
    for length in range(around - 8, around + 11):
        views = append(stepped, tokens[:, length - 1 : length])
        assert_remembers(stepped, views, tokens[:, :length].tolist(), [1])
        whole = new_cache(layout)
        views = append(whole, tokens[:, :length])
        assert_remembers(whole, views, tokens[:, :length].tolist(), [length])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_different_lengths_and_of_none(layout):
    tokens = torch.randn(4, 40, dtype=torch.float64)
    kept: list[list[float]] = [[], [], [], []]
    cache = new_cache(layout)
    for start, stop, counts in [
        (0, 20, [20, 3, 0, 0]), (20, 21, [1, 1, 1, 0]), (21, 30, [0, 9, 4, 0]), (30, 40, [10, 10, 10, 0]),
    ]:  # fmt: skip
        views = append(cache, tokens[:, start:stop], counts)
        for row, count in enumerate(counts):
            kept[row] += tokens[row, stop - count : stop].tolist()
        assert_remembers(cache, views, kept, counts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_crop_makes_the_tokens_as_if_they_had_never_come(layout):
    tokens = torch.randn(1, 60, dtype=torch.float64)
    for length in range(1, 41):
        for crop in range(min(length, 4)):
            cache = new_cache(layout)
            wrong = torch.full((1, crop), 99.0, dtype=torch.float64)
            append(cache, torch.cat([tokens[:, : length - crop], wrong], dim=1))
            cache.crop(crop)
            new = tokens[:, 40:41] if length % 2 else tokens[:, 40:]
            known = tokens[0, : length - crop].tolist() + new[0].tolist()
            assert_remembers(cache, append(cache, new), [known], [new.shape[1]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_crop_refuses_what_is_no_longer_remembered_and_leaves_the_cache_as_it_was(layout):
    cache, tokens = new_cache(layout), torch.randn(1, 300, dtype=torch.float64)
    for column in range(300):
        append(cache, tokens[:, column : column + 1])
    for wrong in (40, 301, -1):
        with pytest.raises(ValueError, match=r"max_crop=3 .* got 40|cannot crop (301|-1) tokens from rows of \[300\]"):
            cache.crop(wrong)
    assert cache.lengths == [300]
    cache.crop(3)
    views = append(cache, tokens[:, :1])
    assert_remembers(cache, views, [tokens[0, :297].tolist() + tokens[0, :1].tolist()], [1])


def oldest(cache) -> int:
    """Position of the oldest key in the window's ring of a cache of 200 tokens."""
    return 200 - cache.tensors.k_win.shape[1]


@pytest.mark.parametrize("layout", ["static", "paged"])
def test_crops_that_follow_each_other_take_back_no_more_than_is_there(layout):
    """The ring has been overwritten behind the longest that a row has been, not behind its length now."""
    cache, tokens = new_cache(layout, max_crop=8), torch.randn(1, 200, dtype=torch.float64)
    append(cache, tokens)
    cache.crop(4)
    cache.crop(4)
    taken = 8
    while oldest(cache) <= 200 - taken - 4 - (CONFIG.window_size - 1):
        cache.crop(4)
        taken += 4
    with pytest.raises(ValueError, match="max_crop=8"):
        cache.crop(4)
    views = append(cache, tokens[:, :1])
    assert_remembers(cache, views, [tokens[0, : 200 - taken].tolist() + tokens[0, :1].tolist()], [1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [[2, 0, 1], [0, 0, 0], [1], [2, 0, 0, 1, 2], [0, -1, 2]], ids=str)
def test_reorder_repeats_drops_and_empties_rows(layout, order):
    tokens = torch.randn(3, 60, dtype=torch.float64)
    cache, counts = new_cache(layout), [50, 17, 32]
    append(cache, tokens[:, :50], counts)
    cache.reorder(torch.tensor(order))
    kept = [tokens[row, 50 - counts[row] : 50].tolist() if row >= 0 else [] for row in order]
    assert cache.lengths == [len(row) for row in kept]
    for step in range(10):  # each row goes its own way, in pages that were one
        new = torch.randn(len(order), 1, dtype=torch.float64)
        views = append(cache, new)
        for row, x in zip(kept, new[:, 0].tolist(), strict=True):
            row.append(x)
        assert_remembers(cache, views, kept, [1] * len(order))
        if step == 5:
            cache.crop(2)
            kept = [row[:-2] for row in kept]


@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_conversion_in_every_direction_goes_on_with_the_same_numbers(source, target, config):
    tokens = torch.randn(3, 60, dtype=torch.float64)
    cache, counts = new_cache(source, config), [45, 0, 17]
    append(cache, tokens[:, :45], counts)
    other = convert(cache, new_cache(target, config))
    kept = [tokens[row, 45 - counts[row] : 45].tolist() for row in range(3)]
    assert other.lengths == cache.lengths == [45, 0, 17]
    for start, stop, new in ((45, 46, [1, 1, 1]), (46, 60, [14, 3, 0])):
        views = append(other, tokens[:, start:stop], new)
        for row, count in enumerate(new):
            kept[row] = kept[row] + tokens[row, stop - count : stop].tolist()
        assert_remembers(other, views, kept, new)
    assert cache.lengths == [45, 0, 17]
    assert_remembers(
        cache, append(cache, tokens[:, :0]), [row[: cache.lengths[i]] for i, row in enumerate(kept)], [0] * 3
    )


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_after_a_conversion_tokens_can_still_be_taken_back(source, target):
    tokens = torch.randn(1, 60, dtype=torch.float64)
    cache = new_cache(source)
    append(cache, tokens[:, :50])
    other = convert(cache, new_cache(target))
    other.crop(3)
    assert_remembers(other, append(other, tokens[:, 50:51]), [tokens[0, :47].tolist() + tokens[0, 50:51].tolist()], [1])


def test_conversion_refuses_another_configuration_and_a_cache_without_room():
    cache = new_cache("growing")
    append(cache, torch.randn(2, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match="caches of one configuration"):
        convert(cache, NSACache(NSAConfig()))
    for layout in ("static", "paged"):
        small = new_cache(layout, room=32)
        append(small, torch.ones(1, 5, dtype=torch.float64))
        with pytest.raises(ValueError, match="at most 32 tokens a row, got 40"):
            convert(cache, small)
        assert small.lengths == [5]
        assert_remembers(small, append(small, torch.ones(1, 1, dtype=torch.float64)), [[1.0] * 6], [1])


def test_past_the_static_length_is_one_line_and_changes_nothing():
    cache = StaticNSACache(CONFIG, 20)
    tokens = torch.randn(2, 20, dtype=torch.float64)
    append(cache, tokens[:, :18])
    for call in (lambda: append(cache, torch.zeros(2, 3, dtype=torch.float64)), lambda: cache.make_room(3)):
        with pytest.raises(ValueError, match=r"^StaticNSACache: expected at most 20 tokens a row, got 21$"):
            call()
    assert cache.lengths == [18, 18]
    assert_remembers(cache, append(cache, tokens[:, 18:]), tokens.tolist(), [2, 2])


def test_out_of_pages_is_one_line_and_changes_nothing():
    cache = PagedNSACache(CONFIG, 3, page_size=PAGE)
    tokens = torch.randn(2, 17, dtype=torch.float64)
    append(cache, tokens[:, :16])
    for call in (lambda: append(cache, torch.zeros(2, 1, dtype=torch.float64)), lambda: cache.make_room(1)):
        with pytest.raises(ValueError, match="out of pages: 2 more of 16 tokens are needed, 1 of 3 are free"):
            call()
    assert (cache.lengths, cache.num_pages_used) == ([16, 16], 2)
    views = append(cache, tokens[:, 16:], [1, 0])
    assert_remembers(cache, views, [tokens[0].tolist(), tokens[1, :16].tolist()], [1, 0])


def test_rows_of_a_common_prefix_share_its_pages_and_copy_only_the_last():
    tokens = torch.randn(1, 70, dtype=torch.float64)
    cache = PagedNSACache(CONFIG, 40, page_size=PAGE)
    append(cache, tokens)
    alone, ring = cache.num_bytes(), cache.tensors.k_win[0].numel() + cache.tensors.k_raw[0].numel()
    assert cache.num_pages_used == 5
    cache.reorder(torch.tensor([0] * 8))
    assert cache.num_pages_used == 5
    rings = 2 * ring * 8  # keys and values, fp64
    assert cache.num_bytes() == alone + 7 * rings
    # The block tables name one page for all rows; compressed keys lie in the same pages.
    assert (cache.tensors.block_table == cache.tensors.block_table[:1]).all()

    new = torch.randn(8, 1, dtype=torch.float64)
    views = append(cache, new)
    assert_remembers(cache, views, [tokens[0].tolist() + row for row in new.tolist()], [1] * 8)
    assert cache.num_pages_used == 4 + 8  # the partly filled page, once for each row; its last holder keeps it
    assert (cache.tensors.block_table[:, :4] == cache.tensors.block_table[:1, :4]).all()
    assert cache.tensors.block_table[:, 4].unique().numel() == 8

    cache.reorder(torch.tensor([3]))
    assert cache.num_pages_used == 5
    assert sorted(cache.table.references) == [0] * 35 + [1] * 5


def test_a_prefix_of_whole_pages_is_copied_by_nobody():
    tokens = torch.randn(1, 4 * PAGE, dtype=torch.float64)
    cache = PagedNSACache(CONFIG, 40, page_size=PAGE)
    append(cache, tokens)
    cache.reorder(torch.tensor([0, 0, 0]))
    new = torch.randn(3, 30, dtype=torch.float64)
    views = append(cache, new, [30, 1, 0])
    kept = [tokens[0].tolist() + row[30 - count :] for row, count in zip(new.tolist(), [30, 1, 0], strict=True)]
    assert_remembers(cache, views, kept, [30, 1, 0])
    assert cache.num_pages_used == 4 + 2 + 1


def test_taking_back_into_a_shared_page_leaves_the_other_rows_alone():
    tokens = torch.randn(1, PAGE + 2, dtype=torch.float64)
    cache = PagedNSACache(CONFIG, 10, page_size=PAGE, max_crop=8)
    append(cache, tokens)
    cache.reorder(torch.tensor([0, 0]))
    cache.crop(5)
    assert cache.num_pages_used == 1
    views = append(cache, torch.tensor([[7.0], [8.0]], dtype=torch.float64))
    known = tokens[0, : PAGE - 3].tolist()
    assert_remembers(cache, views, [[*known, 7.0], [*known, 8.0]], [1, 1])


def test_the_addresses_stay_where_the_rows_stay_as_many():
    for layout in ("static", "paged"):
        cache = new_cache(layout)
        append(cache, torch.randn(3, 30, dtype=torch.float64))
        before = cache.tensors
        cache.reorder(torch.tensor([1, 1, 0]))
        append(cache, torch.randn(3, 300, dtype=torch.float64))
        cache.crop(2)
        assert cache.tensors is before


def test_bytes_are_those_of_the_memory_taken():
    config, shape = NSAConfig(), (1, 4096, 2, 16)
    k, v = torch.zeros(shape), torch.zeros(*shape[:3], 8)
    static, paged = (
        StaticNSACache(config, 8192, max_crop=0, max_new=1),
        PagedNSACache(config, 100, max_crop=0, max_new=1),
    )
    for cache in (static, paged):
        assert cache.num_bytes() == 0
        mean = lambda k, v, first: (k.unfold(1, 32, 16).mean(-1), v.unfold(1, 32, 16).mean(-1))  # noqa: E731
        cache.update(Branches.of_tokens(k, v, k, v, k, v), mean)
    pair = 2 * (16 + 8) * 4
    assert static.num_bytes() == pair * (8192 + 512 + 512 + 32)
    assert paged.num_bytes() == pair * (4096 + 256 + 512 + 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StaticNSACache(CONFIG, 0), "max_length >= 1, got 0"),
        (lambda: PagedNSACache(CONFIG, 0), "at least 1, got 0 and None"),
        (lambda: StaticNSACache(CONFIG, 9, max_new=0), "max_new >= 1, got 0"),
        (lambda: NSACache(CONFIG, max_crop=-1), "max_crop >= 0, got -1"),
        (lambda: append(PagedNSACache(CONFIG, 9, page_size=20), torch.zeros(1, 1)), "select_block_size=8 .* got 20"),
        (lambda: new_cache("static").make_room(5), "max_new=4 new tokens, got 5"),
        (lambda: StaticNSACache(CONFIG, 9).tensors, "`allocate` or `append` first"),
        (lambda: append(StaticNSACache(CONFIG, 9), torch.zeros(1, 1, requires_grad=True)), "for inference"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_rows_is_an_error(layout):
    cache = new_cache(layout)
    append(cache, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected 2 rows as before, got 3"):
        append(cache, torch.zeros(3, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cleared_it_starts_again_in_the_same_memory(layout):
    cache, tokens = new_cache(layout), torch.randn(2, 40, dtype=torch.float64)
    append(cache, tokens)
    memory = getattr(cache, "tensors", None)
    cache.clear()
    assert sum(cache.lengths) == 0
    assert getattr(cache, "num_pages_used", 0) == 0
    assert_remembers(cache, append(cache, tokens[:, 20:]), tokens[:, 20:].tolist(), [20, 20])
    assert getattr(cache, "tensors", None) is memory
