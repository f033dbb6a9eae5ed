"""After an exception, wherever it comes from, a cache is what it was; what it cannot serve it refuses in one line."""

from dataclasses import replace

import pytest
import torch
from decoding import DecodeCase, Scene, append_arguments, same_memory
from moved import moved

from nsa import NativeSparseAttention, NSACache, NSAConfig
from nsa.cache import PagedNSACache, StaticNSACache
from nsa.decoding import append_tokens, decode_attention
from nsa.streams import Branches, Stream

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=12)
LAYOUTS = {
    "growing": lambda config: NSACache(config, max_crop=4),
    "static": lambda config: StaticNSACache(config, 80, max_crop=4, max_new=4),
    "paged": lambda config: PagedNSACache(config, 24, page_size=16, max_crop=4, max_new=4),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
WIDTH = 16


def layer(config: NSAConfig = CONFIG, heads: int = 4, kv_heads: int = 2) -> NativeSparseAttention:
    torch.manual_seed(0)
    attention = NativeSparseAttention(WIDTH, heads, kv_heads, config=config).double()
    return moved(attention, 0.3)


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


def stop(*_: object) -> None:
    raise Stopped


@layouts
@pytest.mark.parametrize(("place", "t"), [("q_proj", 4), ("o_proj", 4), ("compress_v", 30), ("o_proj", 30)])
@pytest.mark.parametrize("filled", [0, 1, 46])
@torch.no_grad()
def test_a_call_that_stops_half_way_leaves_no_trace(layout, place, t, filled):
    attention, x, cache = layer(), torch.randn(2, 80, WIDTH, dtype=torch.float64), LAYOUTS[layout](CONFIG)
    whole = attention(x)
    if filled:
        attention(x[:, : filled - 1], cache=cache)
        # From here on the host of a fixed cache knows no lengths, only bounds.
        attention(x[:, filled - 1 : filled], cache=cache, attention_mask=torch.ones(2, 1))
    bytes_before = cache.num_bytes()
    hook = getattr(attention, place).register_forward_pre_hook(stop)
    for mask in (None, torch.arange(t) >= torch.tensor([[0], [t - 1]]), None):
        with pytest.raises(Stopped):
            attention(torch.randn(2, t, WIDTH, dtype=torch.float64), cache=cache, attention_mask=mask)
    hook.remove()
    assert cache.num_bytes() == bytes_before
    assert cache.lengths == [filled] * (2 if filled else len(cache.lengths))
    if filled > 4:
        cache.crop(4)  # what could be taken back still can
        filled -= 4
    chunks = [1, 3, 80 - filled - 4]
    out = torch.cat([attention(part, cache=cache) for part in x[:, filled:].split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(out, whole[:, filled:], rtol=1e-10, atol=1e-10)


@layouts
@pytest.mark.parametrize("idle", [0, 49], ids=["", "after steps that all rows sat out"])
@torch.no_grad()
def test_a_transaction_takes_all_of_its_calls_back(layout, idle):
    attention, x, cache = layer(), torch.randn(2, 80, WIDTH, dtype=torch.float64), LAYOUTS[layout](CONFIG)
    attention(x[:, :30], cache=cache)
    for _ in range(idle):
        attention(x[:, :1], cache=cache, attention_mask=torch.zeros(2, 1))

    def feed(chunks: list[int]) -> None:
        for part in torch.randn(2, sum(chunks), WIDTH, dtype=torch.float64).split(chunks, dim=1):
            attention(part, cache=cache)

    def stopped(chunks: list[int]) -> None:
        with cache.transaction():
            feed(chunks)
            stop()

    def stopped_again(chunks: list[int]) -> None:
        with cache.transaction():
            with pytest.raises(Stopped):
                stopped(chunks)
            feed(chunks)
            stop()

    for chunks in ([1] * 20, [3, 1, 2], [25, 1], [1, 1, 25]):
        with pytest.raises(Stopped):
            stopped_again(chunks)
    assert cache.lengths == [30, 30]
    torch.testing.assert_close(attention(x[:, 30:], cache=cache), attention(x)[:, 30:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["static", "paged"])
@torch.no_grad()
def test_of_rows_without_tokens_a_stopped_chunk_leaves_nothing_to_remember(layout):
    attention, x, cache = layer(), torch.randn(1, 80, WIDTH, dtype=torch.float64), LAYOUTS[layout](CONFIG)
    attention(x[:, :0], cache=cache)
    hook = attention.o_proj.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        attention(x, cache=cache)
    hook.remove()
    attention(x[:, :1], cache=cache)
    cache.crop(1)
    torch.testing.assert_close(attention(x, cache=cache), attention(x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_stopped_call_gives_its_pages_back_and_leaves_those_who_share_them_alone():
    attention, x = layer(), torch.randn(1, 60, WIDTH, dtype=torch.float64)
    cache = PagedNSACache(CONFIG, 6, page_size=16)
    attention(x[:, :40], cache=cache)
    cache.reorder(torch.tensor([0, 0]))
    hook = attention.o_proj.register_forward_pre_hook(stop)
    for t in (1, 20):
        with pytest.raises(Stopped):
            attention(torch.randn(2, t, WIDTH, dtype=torch.float64), cache=cache)
    hook.remove()
    assert cache.num_pages_used <= 4  # the partly filled page is each row's own now
    out = attention(x[:, 40:48].expand(2, -1, -1), cache=cache)
    torch.testing.assert_close(out, attention(x)[:, 40:48].expand(2, -1, -1), rtol=1e-10, atol=1e-10)


# ---- refused in one line -------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("t", [1, 20])
@pytest.mark.parametrize(("change", "message"), [
    ({"window_size": 512}, "it was made for window_size=12, but the layer has window_size=512$"),
    ({"shared_kv": True, "compress_stride": 8}, "made for compress_stride=4, shared_kv=False, but the layer has"),
    ({"num_selected_blocks": 5}, "num_selected_blocks=4, but the layer has num_selected_blocks=5"),
], ids=["window", "shared, stride", "blocks"])  # fmt: skip
@torch.no_grad()
def test_a_cache_for_another_configuration_than_the_layers_is_refused(layout, t, change, message):
    x, cache = torch.randn(2, 40, WIDTH, dtype=torch.float64), LAYOUTS[layout](CONFIG)
    other = layer(replace(CONFIG, **change))
    for filled in (0, 20):
        if filled:
            layer()(x[:, :20], cache=cache)
        with pytest.raises(ValueError, match=message) as error:
            other(x[:, 20 : 20 + t], cache=cache)
        assert "\n" not in str(error.value)
        assert sum(cache.lengths) == 2 * filled


@layouts
@pytest.mark.parametrize("t", [1, 20])
@torch.no_grad()
def test_a_layer_of_other_heads_rows_or_dtype_is_refused(layout, t, without_shape_checks):
    x, cache = torch.randn(2, 40, WIDTH, dtype=torch.float64), LAYOUTS[layout](CONFIG)
    layer()(x[:, :20], cache=cache)
    for call, message in (
        (lambda: layer(heads=4, kv_heads=1)(x[:, :t], cache=cache), "should have shape .*g=2"),
        (lambda: layer()(x[:1, :t], cache=cache), "expected 2 rows as before, got 1"),
        (lambda: layer().float()(x[:, :t].float(), cache=cache), "torch.float64.*torch.float32"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
        assert cache.lengths == [20, 20]


def pairs(t: int = 3, rows: int = 2, **change: torch.Tensor) -> Branches:
    win = Stream(*(torch.zeros(rows, t, 2, 4) for _ in range(2)))
    return Branches(win, win, win._replace(**change))


@layouts
@pytest.mark.parametrize(("call", "message"), [
    (lambda c: c.update(pairs(), None, counts=[3, 4]), "counts should be b=2 numbers between 0 and t=3"),
    (lambda c: c.update(pairs(), None, counts=[-1, 3]), "counts should be b=2 numbers between 0 and t=3"),
    (lambda c: c.update(pairs(), None, counts=[3]), "counts should be b=2 numbers between 0 and t=3"),
    (lambda c: c.update(pairs(v=torch.zeros(2, 2, 2, 4)), None), "v_win should have shape"),
    (lambda c: c.update(pairs(v=torch.zeros(2, 3, 2, 4).half()), None), "of dtype torch.float32, got torch.float16, t"),
    (lambda c: c.update(pairs(rows=0), None), "at least one row"),
    (lambda c: c.reorder(torch.tensor([0, 2])), r"rows between -1 and 1, got \[0, 2\]"),
    (lambda c: c.reorder(torch.tensor([-2])), r"rows between -1 and 1, got \[-2\]"),
    (lambda c: c.reorder(torch.tensor([], dtype=torch.long)), "at least one int32 or int64"),
    (lambda c: c.reorder(torch.zeros(2)), "at least one int32 or int64, got torch.float32"),
    (lambda c: c.crop(6), "cannot crop 6 tokens"),
], ids=range(11))  # fmt: skip
@torch.no_grad()
def test_what_cannot_be_appended_reordered_or_cropped_is_one_line_and_changes_nothing(
    layout, call, message, without_shape_checks
):
    cache = LAYOUTS[layout](CONFIG)
    cache.update(pairs(5), None)
    with pytest.raises(ValueError, match=message) as error:
        call(cache)
    assert "\n" not in str(error.value)
    assert cache.lengths == [5, 5]


CASE = DecodeCase(lengths=(30, 9), t=2, config=CONFIG, g=2, h=4, d=8, e=8)


@pytest.mark.parametrize(("change", "message"), [
    ({"k": torch.zeros(2, 2, 2, 8, dtype=torch.float64)}, "the cache holds torch.float32, expected k of that dtype"),
    ({"v_win": torch.zeros(2, 2, 2, 8).half()}, "expected v_win of that dtype, got torch.float16"),
    ({"k_win": torch.zeros(2, 1, 2, 8)}, "k_win should have shape"),
    ({"v_raw": torch.zeros(2, 2, 1, 8)}, "v_raw should have shape"),
    ({"cos_cmp": torch.zeros(2, 2, 8), "sin_cmp": torch.zeros(2, 2, 8)}, r"shape \[b, 1, d\], got \[2, 2, 8\]"),
    ({"counts": torch.ones(3, dtype=torch.int32)}, r"counts should be int32 \[b=2\], got torch.int32 \[3\]"),
    ({"counts": torch.ones(2)}, r"counts should be int32 \[b=2\], got torch.float32 \[2\]"),
], ids=range(7))  # fmt: skip
def test_tokens_that_do_not_fit_the_memory_are_one_line_and_change_nothing(change, message, without_shape_checks):
    scene = Scene(CASE)
    tensors = scene.cache((28, 7))
    given = {**scene.new_tokens((28, 7), 2, (2, 2), True), **change}
    with pytest.raises(ValueError, match=message) as error:
        append_tokens(tensors, **append_arguments(given))
    assert "\n" not in str(error.value)
    same_memory(tensors, scene.cache((28, 7)))


def test_more_tokens_at_once_than_a_ring_can_keep_are_refused(without_shape_checks):
    """A window of 60 leaves a ring of 64 room for four more, whatever the ring of compression has."""
    config = replace(CONFIG, window_size=60)
    scene = Scene(replace(CASE, lengths=(70, 70), t=1, config=config))
    tensors, many = scene.cache((40, 40)), Scene(replace(CASE, lengths=(70, 70), t=8, config=config))
    ring = tensors.k_win.shape[1]
    assert ring == 64
    for call, message in (
        (
            lambda: append_tokens(tensors, **append_arguments(many.new_tokens((40, 40), 8, (8, 8), True))),
            "at most 5 tokens at a time",
        ),
        (lambda: decode_attention(many.q, many.gates, tensors, config), "at most 5 queries, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_queries_that_do_not_fit_the_memory_are_one_line(without_shape_checks):
    scene = Scene(CASE)
    tensors = scene.cache(CASE.lengths)
    for q, gates, counts, message in (
        (scene.q.double(), scene.gates, None, "expected q of that dtype, got torch.float64"),
        (scene.q[:, :, :3], scene.gates[:, :, :3], None, "multiple of the KV heads, got 3 and 2"),
        (scene.q, scene.gates[..., :2], None, "gates should have shape"),
        (scene.q[:1], scene.gates[:1], None, r"q should have shape \[b=2"),
        (scene.q, scene.gates, torch.ones(1, dtype=torch.int32), "counts should be int32"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            decode_attention(q, gates, tensors, CONFIG, counts=counts)
        assert "\n" not in str(error.value)
