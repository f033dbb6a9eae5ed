"""Caches under autocast, inference_mode and gradients, and where one call is in another mode than the one before."""

from dataclasses import replace

import pytest
import torch
from decoding import DecodeCase, Scene, append_arguments
from moved import moved

from nsa import NativeSparseAttention, NSACache, NSAConfig
from nsa.cache import PagedNSACache, StaticNSACache, convert
from nsa.decoding import append_tokens, decode_attention
from nsa.testing import assert_close_to_fp64

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=12)
LAYOUTS = {
    "growing": lambda config: NSACache(config),
    "static": lambda config: StaticNSACache(config, 64),
    "paged": lambda config: PagedNSACache(config, 12, page_size=16),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
HALVES = [torch.float16, torch.bfloat16]


def layer(config: NSAConfig = CONFIG) -> NativeSparseAttention:
    torch.manual_seed(0)
    attention = NativeSparseAttention(32, 4, 2, config=config)
    return moved(attention, 0.1)


def in_chunks(attention, x, chunks, cache):
    return torch.cat([attention(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)


# ---- autocast ------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_decoding_under_autocast_is_the_whole_under_autocast(layout, dtype, compression):
    # All blocks are selected: which ones would be is the next test's matter.
    config = replace(CONFIG, compression=compression, num_selected_blocks=8)
    attention, x = layer(config), torch.randn(2, 56, 32)
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            whole, cache = attention(x), LAYOUTS[layout](config)
            out = in_chunks(attention, x, [20, 1, 1, 10, 1, 20, 3], cache)
        truth = attention.double()(x.double())
    assert_close_to_fp64(out, whole, truth)
    assert cache.contents().k.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_around_decoding_rounds_queries_and_keys_and_no_score(dtype):
    """Scores of +-16: rounded to fp16 or bf16 they would choose other blocks."""
    case = DecodeCase(lengths=(64, 41), t=4, config=CONFIG, dtype=dtype, d=16, room=8)
    scene = Scene(case)
    scene.q = scene.q * 8
    cos, sin = scene.rotary(scene.query_positions())
    tensors = scene.cache(case.lengths)
    expected = decode_attention(scene.q, scene.gates, tensors, CONFIG, cos=cos.float(), sin=sin.float())
    with torch.autocast("cpu", dtype):
        found = decode_attention(scene.q.float(), scene.gates, tensors, CONFIG, cos=cos.float(), sin=sin.float())
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_autocast_around_appending_writes_what_the_rounded_tokens_and_weights_write(dtype, compression):
    config = replace(CONFIG, compression=compression)
    scene = Scene(DecodeCase(lengths=(20, 9), t=4, config=config, dtype=dtype))
    given = scene.new_tokens((16, 6), 4, (4, 3), True)
    found, expected = scene.cache((16, 6)), scene.cache((16, 6))
    append_tokens(expected, **append_arguments(given))
    wide = {name: x.float() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for name, x in given.items()}
    wide |= {name: tuple(w.float() for w in given[name]) for name in ("phi_k", "phi_v")}
    wide |= {name: given[name] for name in ("cos", "sin", "cos_cmp", "sin_cmp")}
    with torch.autocast("cpu", dtype):
        append_tokens(found, **append_arguments(wide))
    for name, x in vars(expected).items():
        assert x is None or torch.equal(getattr(found, name), x), name


@layouts
@pytest.mark.parametrize("chunk", [1, 20])
@pytest.mark.parametrize("first", [True, False], ids=["prefill under autocast", "prefill without"])
def test_calls_with_and_without_autocast_over_one_cache_are_refused(layout, chunk, first):
    attention, x = layer(), torch.randn(2, 50, 32)
    cache, undisturbed = LAYOUTS[layout](CONFIG), LAYOUTS[layout](CONFIG)
    names = ["torch.bfloat16", "torch.float32"][:: 1 if first else -1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=first):
        for one in (cache, undisturbed):
            attention(x[:, :20], cache=one)
        with torch.autocast("cpu", torch.bfloat16, enabled=not first):
            with pytest.raises(ValueError, match=names[0] + ".*" + names[1]) as error:
                attention(x[:, 20 : 20 + chunk], cache=cache)
            assert "\n" not in str(error.value)
        assert cache.lengths == [20, 20]
        found, expected = (attention(x[:, 20 : 20 + chunk], cache=one) for one in (cache, undisturbed))
    torch.testing.assert_close(found, expected)


# ---- inference_mode and gradients ------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_filled_in_one_mode_goes_on_in_another(layout, first, then):
    attention, x = layer().double().requires_grad_(False), torch.randn(2, 60, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = attention(x)
    cache = LAYOUTS[layout](CONFIG)
    with first():
        outs = [in_chunks(attention, x[:, :31], [30, 1], cache)]
    with then():
        outs.append(in_chunks(attention, x[:, 31:55], [1, 20, 3], cache))
        cache.crop(3)
        cache.reorder(torch.tensor([1, 0, 1]))
        cache = convert(cache, LAYOUTS[layout](CONFIG))
    with first():
        last = in_chunks(attention, x[[1, 0, 1], 52:], [1, 7], cache)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole[:, :55])
    torch.testing.assert_close(last, whole[[1, 0, 1], 52:])


@pytest.mark.parametrize("frozen", ["", "k_proj", "phi"], ids=["all trained", "keys frozen", "phi frozen"])
def test_gradients_over_a_cache_are_those_of_the_same_tokens_in_one_call(frozen):
    """The first tokens are held fixed: they come under inference_mode; steps without gradients come in between."""
    attention, x = layer().double(), torch.randn(2, 50, 32, dtype=torch.float64)
    for name, parameter in attention.named_parameters():
        parameter.requires_grad_(not (frozen and (frozen in name or (frozen == "phi" and "compress" in name))))
    trained = [parameter for parameter in attention.parameters() if parameter.requires_grad]
    cache = NSACache(CONFIG)
    with torch.inference_mode():
        attention(x[:, :20], cache=cache)
    fork = convert(cache, NSACache(CONFIG))
    outs = [attention(part, cache=cache) for part in x[:, 20:40].split([3, 1, 16], dim=1)]
    with torch.no_grad():  # writes into what a graph may hold, if it is not careful
        attention(x[:, 40:45], cache=cache)
        attention(x[:, 45:], cache=cache)
    found = torch.autograd.grad(torch.cat(outs, dim=1).square().sum(), trained)
    expected = torch.autograd.grad(attention(x[:, 20:40], cache=fork).square().sum(), trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_call_that_raised_leaves_what_a_graph_holds_as_it_was():
    """The memory that a failed call gave back is one that the graph of the call before may hold."""
    attention, x, cache = layer().double(), torch.randn(2, 30, 32, dtype=torch.float64), NSACache(CONFIG)
    for name, parameter in attention.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    with torch.no_grad():
        for part in x[:, :21].split([20, 1], 1):  # leaves room to grow
            attention(part, cache=cache)
    out = attention(x[:, 21:22], cache=cache)

    def fails(*_):
        raise RuntimeError("no")

    with attention.compress_v.register_forward_pre_hook(fails), pytest.raises(RuntimeError, match="no"):
        attention(x[:, 22:24], cache=cache)  # completes a block
    with torch.no_grad():
        attention(x[:, 22:23], cache=cache)
    (found,) = torch.autograd.grad(out.square().sum(), [attention.q_proj.weight])
    (expected,) = torch.autograd.grad(attention(x[:, :22])[:, 21:].square().sum(), [attention.q_proj.weight])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["static", "paged"])
def test_a_fixed_cache_refuses_a_graph_and_is_what_it_was(layout):
    attention, x, cache = layer(), torch.randn(2, 30, 32), LAYOUTS[layout](CONFIG)
    with torch.no_grad():
        attention(x[:, :20], cache=cache)
    for t in (1, 10):
        with pytest.raises(ValueError, match=r"is for inference: expected torch.no_grad\(\), got a graph"):
            attention(x[:, 20 : 20 + t], cache=cache)
    assert cache.lengths == [20, 20]
