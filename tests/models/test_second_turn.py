"""generate() over a cache that is filled already: padding, masks, chunks, candidates, embeddings."""

import pytest
import torch
from tiny_llama import TWINS, model, tokens

from nsa.models import NSALlamaCache

LAYOUTS = {
    "growing": {},
    "static": {"max_length": 160},
    "paged": {"num_pages": 40, "page_size": 16, "max_length": 160},
}
NEW = {"max_new_tokens": 8, "do_sample": False}


def first_turn(built, mask, past_key_values=None):
    """Sequences, their mask and the filled cache."""
    out = built.generate(
        tokens(*mask.shape), attention_mask=mask, past_key_values=past_key_values, return_dict_in_generate=True, **NEW
    )
    return out.sequences, torch.cat([mask, mask.new_ones(len(mask), 8)], dim=1), out.past_key_values


def with_new_tokens(sequences, mask, new_mask):
    new = tokens(*new_mask.shape, seed=2)
    return torch.cat([sequences, new], dim=1), torch.cat([mask, new_mask], dim=1)


def each_row_alone(built, ids, mask):
    rows = [ids[row : row + 1, mask[row].bool()] for row in range(len(ids))]
    return torch.cat([built.generate(row, attention_mask=torch.ones_like(row), **NEW)[:, -8:] for row in rows])


PROMPT = (torch.arange(30) >= torch.tensor([[7], [0]])).long()
PADDINGS = {
    "left": torch.arange(17) >= torch.tensor([[0], [9]]),
    "right": torch.arange(17) < torch.tensor([[17], [5]]),
    "holes": (torch.arange(17) * torch.tensor([[3], [7]])) % 5 > 1,
}


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_padded_second_turn_is_what_each_row_gives_alone(attention, padding):
    built = model(attention)
    sequences, mask, cache = first_turn(built, PROMPT)
    ids, mask = with_new_tokens(sequences, mask, PADDINGS[padding].long())
    out = built.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
    assert torch.equal(out[:, :37], sequences[:, :37])
    assert torch.equal(out[:, -8:], each_row_alone(built, ids, mask))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["whole", "new tokens", "inferred mask", "chunks", "chunks of new tokens"])
def test_every_way_to_give_a_second_turn_is_the_same(layout, form):
    built = model()
    cache = NSALlamaCache(built.config, layout=layout, **LAYOUTS[layout])
    sequences, mask, cache = first_turn(built, PROMPT, cache)
    ids, mask = with_new_tokens(sequences, mask, PADDINGS["right"].long())
    given = {"attention_mask": mask, "inputs": ids}
    if form == "inferred mask":
        given = {"inputs": ids.masked_fill(mask == 0, 0), "pad_token_id": 0}
    elif "new tokens" in form:
        given["inputs"] = ids[:, 37:]
    if "chunks" in form:
        given["prefill_chunk_size"] = 5
    fed = []
    built.model.embed_tokens.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    out = built.generate(past_key_values=cache, **given, **NEW)
    assert sum(fed) == 18 + 7  # the last token of before, the new ones, those generated but the last
    assert torch.equal(out[:, -8:], each_row_alone(built, ids, mask))
    assert cache.caches[0].lengths == [23 + 7 + 18 + 7, 30 + 7 + 6 + 7]


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("chunk", [None, 6])
def test_embeddings_are_what_their_tokens_are_in_both_turns(attention, chunk):
    built = model(attention)
    right = (torch.arange(30) < torch.tensor([[30], [11]])).long()
    ids, new = tokens(2, 30), tokens(2, 9, seed=2)
    embed = built.get_input_embeddings()
    options = {**NEW, "prefill_chunk_size": chunk}
    first = built.generate(
        inputs_embeds=embed(ids), attention_mask=right, return_dict_in_generate=True, **options
    )  # fmt: skip
    assert torch.equal(first.sequences, each_row_alone(built, ids, right))
    moved = right.flip(1)
    whole = torch.cat([ids.gather(1, right.argsort(dim=1, stable=True)), first.sequences, new], dim=1)
    mask = torch.cat([moved, moved.new_ones(2, 17)], dim=1)
    second = built.generate(
        inputs_embeds=embed(whole), attention_mask=mask, past_key_values=first.past_key_values, **options
    )
    assert torch.equal(second, each_row_alone(built, whole, mask))


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 5}, {"assistant": True}])
def test_candidates_over_a_filled_cache_do_not_feed_it_twice(attention, options):
    built = model(attention)
    assistant = {"assistant_model": model(attention, num_hidden_layers=1)} if options.get("assistant") else options
    sequences, mask, cache = first_turn(built, PROMPT[1:])
    ids, mask = with_new_tokens(sequences, mask, torch.ones(1, 9, dtype=torch.long))
    out = built.generate(ids, attention_mask=mask, past_key_values=cache, **assistant, **NEW)
    assert torch.equal(out[:, -8:], each_row_alone(built, ids, mask))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_that_hides_what_is_cached_is_one_line_and_changes_nothing(layout):
    built = model()
    cache = NSALlamaCache(built.config, layout=layout, **LAYOUTS[layout])
    sequences, mask, cache = first_turn(built, PROMPT, cache)
    ids, mask = with_new_tokens(sequences, mask, torch.ones(2, 9, dtype=torch.long))
    hidden = mask.clone()
    hidden[1, 4:10] = 0
    line = r"^attention_mask shows 31 of row 1's cached tokens, the cache holds 37; what is cached cannot be hidden$"
    with pytest.raises(ValueError, match=line):
        built.generate(ids, attention_mask=hidden, past_key_values=cache, **NEW)
    with pytest.raises(ValueError, match=line), torch.no_grad():
        built(ids[:, 37:], attention_mask=hidden, past_key_values=cache)
    with pytest.raises(ValueError, match=r"should have t=10 columns, or 47 with the cached ones; got \[2, 40\]"):
        built(ids[:, 37:], attention_mask=mask[:, :40], past_key_values=cache)
    out = built.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
    assert torch.equal(out[:, -8:], each_row_alone(built, ids, mask))


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_a_twins_mask_that_shows_padding_which_was_moved_is_one_line(attention):
    built = model(attention)
    right = (torch.arange(30) < torch.tensor([[30], [11]])).long()
    sequences, mask, cache = first_turn(built, right)
    ids, mask = with_new_tokens(sequences, mask, torch.ones(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^attention_mask shows padding of the cache, which"):
        built.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
    mask[:, :30] = right.flip(1)
    out = built.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
    assert torch.equal(out[:, -8:], each_row_alone(built, ids, mask))


@pytest.mark.parametrize(
    ("shape", "mask_shape", "options"),
    [
        ((2, 9), (2, 9), {}),  # new tokens without the mask of the cached ones
        ((2, 37), (2, 37), {}),  # nothing new
        ((2, 20), (2, 46), {}),
        ((3, 46), (2, 46), {}),
        ((1, 9), (1, 46), {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_prompts_that_do_not_fit_the_cache_are_one_line(shape, mask_shape, options):
    built = model()
    cache = first_turn(built, PROMPT)[2]
    with pytest.raises(ValueError, match=r"^generate\(\): expected whole sequences.* after 37 cached columns"):
        built.generate(
            tokens(*shape), attention_mask=torch.ones(mask_shape), past_key_values=cache, **options, **NEW
        )  # fmt: skip


def test_a_window_counts_tokens_not_the_padding_between_them():
    built, ids = model("window"), tokens(1, 40)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, 20:32] = 0  # more than the window
    with torch.no_grad():
        padded = built(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        alone = built(ids[:, mask[0].bool()]).logits
    torch.testing.assert_close(padded[:, mask[0].bool()], alone, rtol=1e-9, atol=1e-9)
