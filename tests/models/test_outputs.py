"""What forward returns beside logits, and that generation leaves a model as trainable as it was."""

import pytest
import torch
from tiny_llama import TWINS, config, model, tokens

from nsa.models import NSALlamaCache, NSALlamaForCausalLM
from nsa.models.captured_step import CapturedStep

ROOM = {"growing": {}, "static": {"max_length": 96}, "paged": {"num_pages": 24, "page_size": 16, "max_length": 96}}
COLUMNS = torch.arange(12)
PADDINGS = {
    "left": torch.tensor([[5], [0], [9]]) <= COLUMNS,
    "right": torch.tensor([[12], [4], [1]]) > COLUMNS,
    "holes": (COLUMNS * torch.tensor([[3], [7], [5]])) % 4 > 0,
}


@pytest.mark.parametrize("layout", ROOM)
@pytest.mark.parametrize("padding", PADDINGS)
def test_hidden_states_are_in_the_order_of_their_columns(layout, padding):
    built, ids = model(), tokens(3, 52)
    mask = torch.cat([torch.ones(3, 40, dtype=torch.bool), PADDINGS[padding]], dim=1)
    with torch.no_grad():
        cache = NSALlamaCache(built.config, layout=layout, **ROOM[layout])
        built(ids[:, :40], past_key_values=cache)
        out = built(ids[:, 40:], mask, past_key_values=cache, output_hidden_states=True)
        assert torch.equal(out.hidden_states[0], built.get_input_embeddings()(ids[:, 40:]))
        for row in range(3):
            alone = built(ids[row : row + 1, mask[row]], output_hidden_states=True)
            for hidden, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
                mine = hidden[row, mask[row, 40:]]
                torch.testing.assert_close(mine, expected[0, 40:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["static", "paged"])
def test_a_cache_of_cuda_graphs_gives_what_else_a_step_is_asked_for(layout):
    built, ids = model(), tokens(2, 41)
    with torch.no_grad():
        cache = NSALlamaCache(built.config, layout=layout, **ROOM[layout])
        built(ids[:, :40], past_key_values=cache)
        cache.cuda_graphs = True  # as generate() leaves it on a GPU
        out = built(ids[:, 40:], past_key_values=cache, output_hidden_states=True)
        assert len(out.hidden_states) == 3
        cache.crop(-1)
        as_tuple = built(ids[:, 40:], past_key_values=cache, return_dict=False)
        assert torch.equal(as_tuple[0], out.logits)


@pytest.mark.parametrize("padded", [False, True])
def test_the_decoder_without_its_head_returns_a_tuple_where_it_is_asked_to(padded):
    built, ids = model().model, tokens(2, 44)
    mask = torch.ones(2, 44)
    mask[0, 42:] = 1 - int(padded)
    with torch.no_grad():
        outs = []
        for return_dict in (True, False):
            cache = NSALlamaCache(built.config, layout="static", max_length=64)
            built(ids[:, :40], past_key_values=cache)
            outs.append(built(ids[:, 40:], mask, past_key_values=cache, return_dict=return_dict))
    assert torch.equal(outs[0].last_hidden_state, outs[1][0])


def after(use):
    """A model and the gradients of its training step after `use` has run over it under inference_mode."""
    built = NSALlamaForCausalLM(config()).double()
    built.load_state_dict(model().state_dict())
    if use is not None:
        with torch.inference_mode():
            use(built.eval())
    built.train()(tokens(2, 40), labels=tokens(2, 40)).loss.backward()
    return {name: parameter.grad for name, parameter in built.named_parameters()}


def graph_steps(built):
    cache = NSALlamaCache(built.config, layout="static", max_length=64)
    built(tokens(2, 20), past_key_values=cache)
    decoder = CapturedStep(built, cache, masked=False, capture=False)
    assert decoder.decoder is not None
    decoder(tokens(2, 1))


USES = {
    "forward": lambda built: built(tokens(2, 40)),
    "generate": lambda built: built.generate(tokens(2, 20), max_new_tokens=3),
    "static": lambda built: built.generate(tokens(2, 20), max_new_tokens=3, cache_implementation="static"),
    "the steps of CUDA graphs": graph_steps,
}


@pytest.mark.parametrize("use", USES)
def test_a_model_trains_after_inference_mode(use):
    before, now = after(None), after(USES[use])
    for name, gradient in before.items():
        torch.testing.assert_close(now[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("attention", TWINS)
def test_rotary_factors_that_grow_with_the_length_leave_a_trainable_model(attention):
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    built = model(attention, rope_parameters=scaled, max_position_embeddings=32)
    with torch.inference_mode():
        built(tokens(1, 40))
    built.train()(tokens(2, 40), labels=tokens(2, 40)).loss.backward()
    assert built.lm_head.weight.grad.isfinite().all()
