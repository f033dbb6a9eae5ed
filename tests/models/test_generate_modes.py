"""generate()'s ways to decode: with NSA's cache they give what they give without one, or are refused in one line."""

import pytest
import torch
from tiny_llama import model, tokens
from transformers.generation.streamers import BaseStreamer

MODES = [
    {"num_beams": 3, "do_sample": True},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_return_sequences": 3, "do_sample": True},
    {"guidance_scale": 1.7},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
    {"do_sample": True, "top_p": 0.8, "temperature": 1.5},
]


@pytest.mark.parametrize("layout", ["dynamic", "static"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode))
def test_a_way_to_decode_gives_with_a_cache_what_it_gives_without(layout, mode):
    built, ids = model(), tokens(1 if "guidance_scale" in mode else 2, 26)
    options = {"max_new_tokens": 7, "do_sample": False, **mode}
    outs = []
    for cache in ({"use_cache": False}, {"cache_implementation": layout}):
        torch.manual_seed(3)
        outs.append(built.generate(ids, **cache, **options))
    assert torch.equal(*outs)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_a_streamer_hears_the_sequence():
    built, heard = model(), Heard()
    out = built.generate(tokens(1, 20), streamer=heard, max_new_tokens=5, do_sample=False)
    assert heard.tokens == [*out[0].tolist(), -1]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires `trust_remote_code=True`"),
        ({"dola_layers": "low"}, "Dola Generation requires `trust_remote_code=True`"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "Group Beam Search requires"),
        ({"num_beams": 4, "force_words_ids": [[5]]}, "Constrained Beam Search requires"),
        ({"cache_implementation": "quantized"}, "'static' or 'dynamic', got 'quantized'"),
        ({"cache_implementation": "offloaded"}, "'static' or 'dynamic', got 'offloaded'"),
        ({"cache_implementation": "static", "prompt_lookup_num_tokens": 3}, "not supported with Static cache"),
    ],
)
def test_a_way_that_is_not_there_is_one_line(mode, message):
    with pytest.raises(ValueError, match=message) as caught:
        model().generate(tokens(1, 20), max_new_tokens=3, **mode)
    assert "\n" not in str(caught.value)
