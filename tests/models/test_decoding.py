"""Decoding by the model: every layout of its cache, the step that is captured, generate() over all of them."""

import warnings
from functools import cache

import pytest
import torch
from tiny_llama import SIZES, model, tokens

from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.captured_step import CapturedStep

LAYOUTS = ("growing", "static", "paged")


def new_cache(built, layout, **kwargs) -> NSALlamaCache:
    sizes = {"static": {"max_length": 320}, "paged": {"num_pages": 80, "page_size": 16, "max_length": 320}}
    return NSALlamaCache(built.config, layout=layout, **{**sizes.get(layout, {}), **kwargs})


def in_chunks(built, ids, chunks, cache, mask=None):
    outs, done = [], 0
    for chunk in chunks:
        upto = None if mask is None else mask[:, : done + chunk]
        out = built(ids[:, done : done + chunk], attention_mask=upto, past_key_values=cache, use_cache=True)
        outs.append(out.logits)
        done += chunk
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize(("layout", "length"), [("growing", 1), ("growing", 8), *((layout, 21) for layout in LAYOUTS)])
def test_every_split_into_prefill_and_decoding_gives_the_whole(layout, length):
    built, ids = model(), tokens(2, length)
    with torch.no_grad():
        whole = built(ids, use_cache=False).logits
        for prefill in range(1, length + 1, 5 if length > 8 else 1):
            out = in_chunks(built, ids, [prefill] + [1] * (length - prefill), new_cache(built, layout))
            torch.testing.assert_close(out, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_chunks_of_a_padded_batch_give_what_each_row_gives_alone(layout, side):
    built, ids = model(), tokens(3, 60)
    column = torch.arange(60)
    mask = {
        "left": column >= torch.tensor([[0], [45], [9]]),
        "right": column < torch.tensor([[60], [5], [31]]),
        "holes": torch.rand(3, 60) > 0.4,
    }[side]
    with torch.no_grad():
        cache = new_cache(built, layout)
        out = in_chunks(built, ids, [17, 1, 1, 10, 21, 1, 9], cache, mask.long())
        for row in range(3):
            alone = built(ids[row : row + 1, mask[row]]).logits
            torch.testing.assert_close(out[row : row + 1, mask[row]], alone, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 60
    assert all(layer.lengths == mask.sum(1).tolist() for layer in cache.caches)


@pytest.mark.parametrize("layout", ["static", "paged"])
def test_the_captured_step_is_the_step(layout):
    """The decoder's buffers in, logits out: what a graph replays, here run each time."""
    built, ids = model(), tokens(3, 300)
    mask = torch.ones(3, 300, dtype=torch.long)
    mask[1, :290] = 0
    mask[2] = 0  # a row that pads the batch
    mask[0, 296] = 0  # one that sits a step out
    with torch.no_grad():
        cache = new_cache(built, layout)
        in_chunks(built, ids, [295], cache, mask)
        decoder = CapturedStep(built, cache, masked=True, capture=False)
        for column in range(295, 300):
            assert decoder.serves(ids[:, column : column + 1], mask)
            logits = decoder(ids[:, column : column + 1], mask[:, : column + 1])
            for row in (0, 1):
                known = mask[row, : column + 1].bool()
                if known[-1]:
                    alone = built(ids[row : row + 1, : column + 1][:, known]).logits
                    torch.testing.assert_close(logits[row], alone[0, -1:], rtol=1e-9, atol=1e-9)
    assert [layer.lengths for layer in cache.caches] == [[299, 10, 0]] * 2
    assert cache.get_seq_length() == 300


def test_a_decoder_serves_its_own_addresses_only():
    built, ids = model(), tokens(2, 20)
    with torch.no_grad():
        cache = new_cache(built, "paged")
        built(ids, past_key_values=cache)
        decoder = CapturedStep(built, cache, masked=False, capture=False)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert decoder.serves(ids[:, :1], None)
        assert not decoder.serves(ids[:, :1], torch.ones(2, 21))
        cache.reorder_cache(torch.tensor([0, 1, 1]))
        assert not decoder.serves(tokens(3, 1), None)
        assert not decoder.serves(ids[:, :1], None)


def test_weights_side_by_side_are_the_models_own(tmp_path):
    """They take no memory, are made once, change with the model's, and are saved as before."""
    built, ids = model(), tokens(2, 20)
    before = {name: parameter.clone() for name, parameter in built.named_parameters()}
    with torch.no_grad():
        cache = new_cache(built, "static")
        built(ids, past_key_values=cache)
        decoder = CapturedStep(built, cache, masked=False, capture=False)
        again = CapturedStep(built, cache, masked=False, capture=False)
        for one, other in zip(decoder.decoder.layers, again.decoder.layers, strict=True):
            assert one.inputs.weight.data_ptr() == other.inputs.weight.data_ptr()
            assert one.inputs.weight.data_ptr() == one.attention.q_proj.weight.data_ptr()
            assert torch.equal(one.inputs.weight, other.inputs.weight)
            assert torch.equal(one.inputs.weight[-1], one.attention.g_proj.weight[-1])
        assert all(torch.equal(parameter, before[name]) for name, parameter in built.named_parameters())
        for parameter in built.model.layers.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 0.9)
        whole = built(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
        cache = new_cache(built, "static")
        built(ids, past_key_values=cache)
        again = CapturedStep(built, cache, masked=False, capture=False)
        again.decoder = decoder.decoder
        torch.testing.assert_close(again(ids[:, :1]), whole, rtol=1e-9, atol=1e-9)
    built.save_pretrained(tmp_path)
    loaded = NSALlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), built.parameters(), strict=True))


def test_a_model_with_more_than_its_weights_steps_by_its_modules():
    built, ids = model(), tokens(2, 21)
    built.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        cache = new_cache(built, "static")
        built(ids[:, :20], past_key_values=cache)
        decoder = CapturedStep(built, cache, masked=False, capture=False)
        assert decoder.decoder is None
        torch.testing.assert_close(decoder(ids[:, 20:]), built(ids).logits[:, 20:], rtol=1e-9, atol=1e-9)


@cache
def without_a_cache(options: tuple) -> torch.Tensor:
    built = model()
    torch.manual_seed(3)
    return built.generate(tokens(2, 30), max_new_tokens=15, use_cache=False, **dict(options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_generation_is_that_without_a_cache(layout, chunk):
    built = model()
    for options in ((("do_sample", False),), (("num_beams", 3),), (("do_sample", True), ("top_k", 5))):
        expected = without_a_cache(options)
        torch.manual_seed(3)
        out = built.generate(
            tokens(2, 30), max_new_tokens=15, past_key_values=new_cache(built, layout), prefill_chunk_size=chunk,
            **dict(options),
        )  # fmt: skip
        assert torch.equal(out, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"prefill_chunk_size": 8}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_through_the_captured_step_is_that_of_the_growing_cache(graphs_without_capture, options, side):
    built, ids = model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    (mask[0, :18] if side == "left" else mask[0, 12:]).zero_()
    made = []
    for given in (None, NSALlamaCache(built.config)):
        torch.manual_seed(3)
        options = {"do_sample": False, "attention_mask": mask, "max_new_tokens": 12, **options}
        made.append(built.generate(ids, past_key_values=given, **options))
        said = "CUDA graphs" if given is None else "no CUDA graphs: the cache grows"
        assert built.decode_path == said
    assert torch.equal(*made)


def test_one_decoder_serves_all_steps_and_the_next_call_with_its_cache(graphs_without_capture):
    built, ids = model(), tokens(2, 30)
    cache = new_cache(built, "static")
    first = built.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    step = cache.captured_step
    assert step.steps == 9
    longer = built.generate(first, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert cache.captured_step is step
    assert torch.equal(longer, built.generate(ids, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_assisted_generation_takes_back_rejected_tokens(layout):
    built, ids = model(), tokens(1, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own notes on its assistant's settings
        assisted = built.generate(
            ids, assistant_model=model(num_hidden_layers=1), max_new_tokens=20, do_sample=False,
            past_key_values=new_cache(built, layout),
        )  # fmt: skip
    assert torch.equal(assisted, built.generate(ids, max_new_tokens=20, do_sample=False))


def test_assisted_generation_through_captured_steps(graphs_without_capture):
    built, ids = model(), tokens(1, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assisted = built.generate(ids, assistant_model=model(num_hidden_layers=1), max_new_tokens=20, do_sample=False)
    assert torch.equal(assisted, built.generate(ids, max_new_tokens=20, do_sample=False))


def test_static_by_name_and_dynamic_by_name(graphs_without_capture):
    built, ids = model(), tokens(2, 30)
    kinds = {}
    for kind in ("static", "dynamic", None):
        out = built.generate(
            ids, cache_implementation=kind, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
        )
        kinds[kind] = out.past_key_values.layout
    assert kinds == {"static": "static", "dynamic": "growing", None: "static"}
    out = built.generate(ids, num_beams=2, max_new_tokens=8, return_dict_in_generate=True)
    assert out.past_key_values.layout == "paged"


@pytest.mark.parametrize("layout", ["static", "paged"])
def test_without_room_a_step_is_one_line_and_no_layer_has_changed(layout):
    built, ids = model(), tokens(1, 33)
    with torch.no_grad():
        cache = new_cache(built, layout, max_length=32)
        in_chunks(built, ids, [31, 1], cache)
        for chunk in (1, 20):
            with pytest.raises(ValueError, match="at most 32 tokens a row"):
                built(torch.ones(1, chunk, dtype=torch.long), past_key_values=cache)
            assert [layer.lengths for layer in cache.caches] == [[32], [32]]
            assert cache.get_seq_length() == 32
        cache.crop(-1)
        logits = built(ids[:, 31:32], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, -1], built(ids[:, :32]).logits[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_a_cache_can_be_moved_into_another_layout_between_steps(layout, target):
    built, ids = model(), tokens(2, 40)
    with torch.no_grad():
        cache = new_cache(built, layout)
        in_chunks(built, ids, [30, 1, 1], cache)
        moved = cache.convert(new_cache(built, target))
        assert moved.get_seq_length() == 32
        out = in_chunks(built, ids[:, 32:], [1, 1, 6], moved)
        torch.testing.assert_close(out, built(ids).logits[:, 32:], rtol=1e-9, atol=1e-9)


def test_a_reset_cache_starts_again():
    built, ids = model(), tokens(2, 30)
    for layout in LAYOUTS:
        cache = new_cache(built, layout)
        first = built.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(first, built.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False))


def test_cuda_graphs_asked_for_where_they_cannot_be_are_one_line():
    built, ids = model(), tokens(1, 10)
    with pytest.raises(ValueError, match=r"^generate\(cuda_graphs=True\) cannot be: the model is on cpu$"):
        built.generate(ids, max_new_tokens=3, cuda_graphs=True)
    built.generate(ids, max_new_tokens=3)
    assert built.decode_path == "no CUDA graphs: the model is on cpu"
    built.generate(ids, max_new_tokens=3, cuda_graphs=False)
    assert built.decode_path == "no CUDA graphs: cuda_graphs=False"
    dense = NSALlamaForCausalLM(NSALlamaConfig(attention="dense", **SIZES))
    with pytest.raises(ValueError, match=r"cannot be: attention='dense'$"):
        dense.generate(ids, max_new_tokens=3, cuda_graphs=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "static"}, "'static' with max_length"),
        ({"layout": "paged"}, "'paged' with num_pages"),
        ({"layout": "round"}, "got 'round'"),
    ],
)
def test_a_cache_without_its_sizes_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        NSALlamaCache(model().config, **arguments)
