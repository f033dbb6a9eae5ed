"""The layer over every layout of its cache: whole == chunks == decoding steps, growing == static == paged."""

from itertools import product

import pytest
import torch
from tiny_layer import CONFIG, in_chunks, layer

from nsa import NSACache, NSAConfig
from nsa.cache import LayerCache, PagedNSACache, StaticNSACache, convert

LAYOUTS = ("growing", "static", "paged")
PAGE = 16


def new_cache(layout: str, config: NSAConfig = CONFIG, room: int = 640) -> LayerCache:
    if layout == "growing":
        return NSACache(config, max_crop=4)
    if layout == "static":
        return StaticNSACache(config, room, max_crop=4, max_new=5)
    return PagedNSACache(config, room // PAGE * 4, page_size=PAGE, max_length=room, max_crop=4, max_new=5)


@pytest.mark.parametrize(("layout", "length"), [*product(LAYOUTS, [1, 2, 7, 8, 9, 12, 17]), ("growing", 33)])
def test_every_split_into_prefill_and_decoding_gives_the_whole(layout, length):
    attention, x = layer(), torch.randn(2, length, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = attention(x)
        for prefill in range(length + 1):
            out = in_chunks(attention, x, [prefill] + [1] * (length - prefill), new_cache(layout))
            torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", range(0, 61, 5))
def test_every_chunking_gives_the_whole(layout, first):
    attention, x = layer(), torch.randn(1, 60, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = attention(x)
        for second in range(first, 61, 3 if layout == "growing" else 4):
            out = in_chunks(attention, x, [first, second - first, 60 - second], new_cache(layout))
            torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["static", "paged"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("around", [PAGE, 256, 512])
def test_every_length_around_page_boundaries_by_steps_of_several_tokens(layout, steps, around):
    attention, x = layer(), torch.randn(1, around + 8, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = attention(x)
        chunks = [around - 7] + [steps] * (15 // steps) + [15 % steps]
        out = in_chunks(attention, x, chunks, new_cache(layout))
        torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
def test_chunks_give_the_whole_for_every_compression_and_shared_keys(layout, compression, shared_kv):
    config = NSAConfig.from_dict({**CONFIG.to_dict(), "compression": compression, "shared_kv": shared_kv})
    attention, x = layer(config), torch.randn(2, 50, 24, dtype=torch.float64)
    with torch.no_grad():
        out = in_chunks(attention, x, [20, 1, 1, 10, 5, 3, 10], new_cache(layout, config))
        torch.testing.assert_close(out, attention(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", ["left", "right", "holes", "an empty row"])
@pytest.mark.parametrize(
    "chunks", [[45], [20, 25], [30] + [1] * 15, [1] * 45, [20] + [5] * 5], ids=lambda c: f"{len(c)} chunks"
)
def test_a_padded_batch_gives_what_each_row_gives_alone(layout, padding, chunks):
    attention, x = layer(), torch.randn(3, 45, 24, dtype=torch.float64)
    column, lengths = torch.arange(45), torch.tensor([45, 13, 30])[:, None]
    mask = {
        "left": column >= 45 - lengths,
        "right": column < lengths,
        "holes": torch.rand(3, 45) > 0.4,
        "an empty row": (column >= 45 - lengths) & torch.tensor([[True], [False], [True]]),
    }[padding]
    with torch.no_grad():
        outs = [in_chunks(attention, x, chunks, cache := new_cache(layout), mask.long())]
        outs += [attention(x, attention_mask=mask)] if chunks == [45] else []
        for out, row in product(outs, range(3)):
            if mask[row].any():
                alone = attention(x[row : row + 1, mask[row]])
                torch.testing.assert_close(out[row : row + 1, mask[row]], alone, rtol=1e-10, atol=1e-10)
        assert all((out[~mask] == 0).all() for out in outs)
        assert cache.lengths == mask.sum(1).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_a_conversion_in_the_middle_changes_nothing(layout, target):
    attention, x = layer(), torch.randn(2, 60, 24, dtype=torch.float64)
    with torch.no_grad():
        cache = new_cache(layout)
        outs = [in_chunks(attention, x[:, :37], [30, 1, 1, 5], cache)]
        outs.append(in_chunks(attention, x[:, 37:], [1, 2, 20], convert(cache, new_cache(target))))
        torch.testing.assert_close(torch.cat(outs, dim=1), attention(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_taken_back_leave_no_trace(layout):
    """Speculative decoding: five tokens forward, some of them back, again and again."""
    attention, x = layer(), torch.randn(2, 60, 24, dtype=torch.float64)
    with torch.no_grad():
        whole, cache, done = attention(x), new_cache(layout), 20
        attention(x[:, :20], cache=cache)
        for back in (4, 0, 3, 1, 2, 4, 4):
            step = x[:, done : done + 5].clone()
            step[:, 5 - back :] = torch.randn_like(step[:, 5 - back :])
            out = attention(step, cache=cache)[:, : 5 - back]
            torch.testing.assert_close(out, whole[:, done : done + 5 - back], rtol=1e-10, atol=1e-10)
            cache.crop(back)
            done += 5 - back


def test_rows_forked_from_one_prompt_give_what_each_gives_alone():
    attention, prompt = layer(), torch.randn(1, 40, 24, dtype=torch.float64)
    x = torch.randn(4, 30, 24, dtype=torch.float64)
    with torch.no_grad():
        cache = new_cache("paged")
        attention(prompt, cache=cache)
        cache.reorder(torch.zeros(4, dtype=torch.long))
        before = cache.num_pages_used
        out = in_chunks(attention, x, [1, 1, 5, 20, 3], cache)
        whole = attention(torch.cat([prompt.expand(4, -1, -1), x], dim=1))[:, 40:]
    torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)
    assert before == 3
    assert cache.num_pages_used == 2 + 4 * 3  # two pages of the prompt whole, once; the third a copy of each row's own


@pytest.mark.parametrize("layout", ["static", "paged"])
def test_a_step_without_room_is_one_line_and_changes_nothing(layout):
    attention, x = layer(), torch.randn(1, 34, 24, dtype=torch.float64)
    with torch.no_grad():
        cache = new_cache(layout, room=32)
        attention(x[:, :32], cache=cache)
        with pytest.raises(ValueError, match="at most 32 tokens a row, got 33"):
            attention(x[:, 32:33], cache=cache)
        assert cache.lengths == [32]
        cache.crop(1)
        out = attention(x[:, 31:32], cache=cache)
        torch.testing.assert_close(out, attention(x[:, :32])[:, -1:], rtol=1e-10, atol=1e-10)


def test_rows_that_sit_steps_out_do_not_use_up_the_room():
    """The host keeps a bound of the lengths; at the end of the room it asks the device."""
    attention, x = layer(), torch.randn(2, 60, 24, dtype=torch.float64)
    mask = torch.zeros(2, 60)
    mask[0, :20], mask[1, ::2] = 1, 1
    with torch.no_grad():
        out = in_chunks(attention, x, [20] + [1] * 40, cache := new_cache("static", room=32), mask)
        alone = attention(x[1:, ::2])
    assert cache.lengths == [20, 30]
    torch.testing.assert_close(out[1:, ::2], alone, rtol=1e-10, atol=1e-10)
