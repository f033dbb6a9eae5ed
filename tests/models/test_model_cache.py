"""The model over its cache: another model's is refused, an exception leaves no trace, modes may change."""

from functools import partial

import pytest
import torch
from moved import moved

from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.captured_step import CapturedStep
from nsa.testing import assert_close_to_fp64

SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
NSA = {
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 8,
    "num_selected_blocks": 8,
    "window_size": 10,
}
LAYOUTS = ("growing", "static", "paged")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


def stop(*_: object) -> None:
    raise Stopped


def model(nsa: dict | None = None, **kwargs) -> NSALlamaForCausalLM:
    torch.manual_seed(0)
    built = NSALlamaForCausalLM(NSALlamaConfig(attention="nsa", nsa=nsa or NSA, **{**SIZES, **kwargs})).eval()
    return moved(built, 0.1)


def new_cache(config: NSALlamaConfig, layout: str) -> NSALlamaCache:
    sizes = {"static": {"max_length": 96}, "paged": {"num_pages": 24, "page_size": 16, "max_length": 96}}
    return NSALlamaCache(config, layout=layout, **sizes.get(layout, {}))


def tokens(columns: int) -> torch.Tensor:
    return torch.randint(2, 40, (2, columns), generator=torch.Generator().manual_seed(1))


def in_chunks(built, ids, chunks, cache) -> torch.Tensor:
    return torch.cat([built(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)], dim=1)


@layouts
@pytest.mark.parametrize("place", ["layers.0.self_attn.o_proj", "layers.2.self_attn.q_proj", "layers.1.mlp", "norm"])
@pytest.mark.parametrize("t", [1, 20])
@torch.no_grad()
def test_a_forward_that_stops_in_any_layer_leaves_no_trace_in_any(layout, place, t):
    built, ids, cache = model().double(), tokens(60), new_cache(NSALlamaConfig(nsa=NSA, **SIZES), layout)
    whole = built(ids).logits
    for filled in (0, 30):
        if filled:
            in_chunks(built, ids[:, :30], [29, 1], cache)
        hook = built.model.get_submodule(place).register_forward_pre_hook(stop)
        with pytest.raises(Stopped):
            built(tokens(40)[:, -t:], past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == filled
        assert all(sum(layer.lengths) == 2 * filled for layer in cache.caches)
    torch.testing.assert_close(in_chunks(built, ids[:, 30:], [1, 20, 9], cache), whole[:, 30:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_replay_that_stops_before_it_began_leaves_the_host_no_token_ahead(masked):
    built, ids, cache = model().double(), tokens(40), new_cache(NSALlamaConfig(nsa=NSA, **SIZES), "static")
    mask = torch.ones(2, 40, dtype=torch.long) if masked else None
    in_chunks(built, ids[:, :30], [29, 1], cache)
    decoder = CapturedStep(built, cache, masked=masked, capture=False)
    decoder.graph = type("Graph", (), {"replay": stop})()
    with pytest.raises(Stopped):
        decoder(ids[:, 3:4], mask)
    assert cache.get_seq_length() == 30
    assert [layer.lengths for layer in cache.caches] == [[30, 30]] * 3
    out = in_chunks(built, ids[:, 30:], [1, 9], cache)
    torch.testing.assert_close(out, built(ids).logits[:, 30:], rtol=1e-9, atol=1e-9)


@layouts
@pytest.mark.parametrize(("other", "message"), [
    ({"nsa": {**NSA, "window_size": 20}}, "made for window_size=20, but the layer has window_size=10"),
    ({"num_hidden_layers": 2}, "made for 2 layers, but the model has 3"),
], ids=["window", "layers"])  # fmt: skip
@torch.no_grad()
def test_a_cache_of_another_model_is_refused_by_prefill_step_and_decoder(layout, other, message):
    ids, config = tokens(30), NSALlamaConfig(**{**SIZES, "nsa": NSA, "attention": "nsa", **other})
    cache = new_cache(config, layout)
    calls = [lambda: model()(ids[:, :1], past_key_values=cache), lambda: model()(ids, past_key_values=cache)]
    if layout != "growing":
        calls.append(lambda: CapturedStep(model(), cache, masked=False, capture=False))
    for call in calls:
        model(**{"nsa": NSA, **other})(ids[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@layouts
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_cache_filled_in_one_mode_goes_on_in_another(layout, captured, modes, monkeypatch):
    monkeypatch.setattr("nsa.models.language_model.CapturedStep", partial(CapturedStep, capture=False))
    built, ids = model().double(), tokens(60)
    cache = new_cache(built.config, layout)
    cache.cuda_graphs = captured and layout != "growing"
    with torch.no_grad():
        whole = built(ids).logits
    outs = []
    for mode, part in zip(modes * 2, ids.split([30, 2, 26, 2], dim=1), strict=True):
        with mode():
            outs.append(in_chunks(built, part, 26 if part.shape[1] > 2 else 1, cache))
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=1e-9, atol=1e-9)


@layouts
@pytest.mark.parametrize("captured", [False, True])
@torch.no_grad()
def test_decoding_under_autocast_is_the_whole_under_autocast(layout, captured, monkeypatch):
    monkeypatch.setattr("nsa.models.language_model.CapturedStep", partial(CapturedStep, capture=False))
    built, ids = model(), tokens(50)
    cache = new_cache(built.config, layout)
    cache.cuda_graphs = captured and layout != "growing"
    with torch.autocast("cpu", torch.bfloat16):
        whole = built(ids, use_cache=False).logits
        out = in_chunks(built, ids, [30, 1, 1, 17, 1], cache)
    assert cache.caches[0].contents().k.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"torch.bfloat16.*torch.float32"):
        built(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 50
    assert_close_to_fp64(out, whole, built.double()(ids, use_cache=False).logits)
