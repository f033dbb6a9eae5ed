"""Models of which some layers keep dense attention: packed rows, generation, training."""

from dataclasses import replace

import pytest
import torch

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.config import TrainConfig
from nsa.training.sizes import model_config

SIZES = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 16, "num_selected_blocks": 3}


def hybrid(**values):
    torch.manual_seed(0)
    config = NSALlamaConfig(
        attention="nsa", dense_layers=[1], nsa=SIZES | {"window_size": 24}, vocab_size=64, hidden_size=64,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        initializer_range=0.2, pad_token_id=0, eos_token_id=None, **values,
    )  # fmt: skip
    return NSALlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("implementation", [None, "sdpa"])
def test_a_packed_row_is_its_documents_alone(implementation):
    model = hybrid(**({} if implementation is None else {"attn_implementation": implementation}))
    assert model.config._attn_implementation == (implementation or "nsa_dense")
    lengths = [7, 90, 33]
    ids = torch.randint(1, 64, (1, sum(lengths)))
    bounds = torch.tensor([0, *lengths, 0]).cumsum(0).int()
    found = model(input_ids=ids, cu_seq_lens_q=bounds, max_length_q=128, use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in ids[0].split(lengths)])
    torch.testing.assert_close(found, alone)


def test_the_bytes_that_a_token_adds_to_the_cache_are_those_of_all_layers():
    model, held = hybrid(), []
    for length in (256, 512):
        held.append(model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values.num_bytes())
    assert (held[1] - held[0]) / 256 == model.cache_bytes_per_token()


def test_a_packed_row_of_the_dense_layers_makes_no_mask(monkeypatch):
    """[t, t] entries would be a gigabyte of a row of 32k tokens."""
    seen = []
    monkeypatch.setattr("nsa.models.twins.sdpa_attention_forward", lambda *args, **_: seen.append(args))
    ids = torch.randint(1, 64, (1, 64))
    hybrid()(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 30, 64]).int(), max_length_q=64, use_cache=False)
    assert not seen


def test_greedy_tokens_are_those_of_whole_forwards():
    model = hybrid()
    ids = torch.randint(1, 64, (2, 70))
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_nsa_train_makes_the_layers_that_its_flag_names():
    config = TrainConfig(dense_layers=(0, 3))
    assert model_config(config).dense_layers == [0, 3]
    for wrong in ({"dense_layers": (4,)}, {"attention": "dense"}):
        with pytest.raises(ValueError, match="dense_layers: expected"):
            model_config(replace(config, **wrong))
    with pytest.raises(ValueError, match="dense_layers: expected none, or cp=1"):
        replace(config, cp=2).validate()
