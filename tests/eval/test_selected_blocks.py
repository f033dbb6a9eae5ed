"""What a model reads, counted against a mask made from the definitions."""

import pytest
import torch

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.eval.blocks import counted_keys, keys_per_query, limits_of_dense_layers, selections_of
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
         "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
NSA = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4,
       "window_size": 10}  # fmt: skip
INFLLM_V2 = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "window_size": 8, "topk": 3, "dense_len": 40}


def twin(attention: str) -> NSALlamaForCausalLM:
    torch.manual_seed(0)
    return NSALlamaForCausalLM(NSALlamaConfig(**SIZES, attention=attention, nsa=NSA, infllm_v2=INFLLM_V2)).eval()


@pytest.fixture(scope="module")
def layers():
    return selections_of(twin("nsa"), torch.randint(50, (101,), generator=torch.Generator().manual_seed(1)).tolist())


def test_every_layer_and_group_is_there(layers):
    assert [layer.num_groups for layer in layers] == [2, 2]
    assert all(layer.block_indices.shape == (101, 2, 4) for layer in layers)
    assert all(layer.block_scores.shape[:2] == (101, 2) for layer in layers)


def test_keys_are_those_of_a_mask_written_out_token_by_token(layers):
    for layer in layers:
        for position in (0, 6, 7, 31, 63, 100):
            for group in range(2):
                compressed = [i for i in range(101) if i * 4 + 8 - 1 <= position]
                selected = [s for s in range(position + 1) if s // 8 in layer.selected(position, group)]
                window = [s for s in range(101) if position - 10 < s <= position]
                assert layer.keys_read(position, group) == len(compressed) + len(selected) + len(window)


def test_keys_of_infllm_v2_are_those_of_the_listed_blocks_and_the_pooled_ones_where_it_had_to_choose():
    config = InfLLMv2Config.from_dict(INFLLM_V2)
    tokens = torch.randint(50, (101,), generator=torch.Generator().manual_seed(1)).tolist()
    layers = selections_of(twin("infllm_v2"), tokens)
    assert [layer.num_groups for layer in layers] == [2, 2]
    for position in (0, 7, 31, 39, 40, 63, 95, 100):
        for layer in layers:
            for group in range(2):
                blocks = layer.selected(position, group)
                assert set(layer.forced(position)) <= set(blocks)
                selected = [s for s in range(position + 1) if s // 8 in blocks]
                pooled = [i for i in range(101) if i * 4 + 8 - 1 <= position] if position >= 40 else []
                assert layer.keys_read(position, group) == len(selected) + len(pooled)
        assert counted_keys(layers, position) <= keys_per_query("infllm_v2", config, position + 1)
    assert counted_keys(layers, 95) == keys_per_query("infllm_v2", config, 96)
    assert counted_keys(layers, 39) == 40


def test_forced_blocks_are_always_among_the_selected(layers):
    for layer in layers:
        for position in range(101):
            for group in range(2):
                assert set(layer.forced(position)) <= set(layer.selected(position, group))


def test_counted_keys_never_exceed_the_formula(layers):
    """The own block of a query in its middle holds less than l' keys; at a block's end the two agree."""
    config = NSAConfig.from_dict(NSA)
    for position in range(101):
        assert counted_keys(layers, position) <= keys_per_query("nsa", config, position + 1)
    assert counted_keys(layers, 95) == keys_per_query("nsa", config, 96)


def test_the_other_twins_have_nothing_to_select():
    for attention in ("dense", "window"):
        assert selections_of(twin(attention), [1, 2, 3]) == []


def test_looking_inside_leaves_the_model_as_it_was():
    model = twin("nsa")
    before = model(torch.tensor([[1, 2, 3]])).logits
    selections_of(model, [1, 2, 3])
    assert torch.equal(before, model(torch.tensor([[1, 2, 3]])).logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_formula_of_the_twins():
    config = NSAConfig()  # the paper's: 2048 keys at 8k, within the block that is not complete
    assert keys_per_query("dense", config, 8192) == 8192
    assert keys_per_query("window", config, 8192) == 512
    assert keys_per_query("nsa", config, 8192) == config.keys_per_query(8192)


def test_layers_that_stay_dense_count_with_all_that_they_see(layers):
    half = NSALlamaForCausalLM(NSALlamaConfig(**SIZES | {"num_hidden_layers": 3}, nsa=NSA, dense_layers=[1]))
    assert limits_of_dense_layers(half.config, 96) == [96]
    sparse = keys_per_query("nsa", NSAConfig.from_dict(NSA), 96)
    assert counted_keys(layers, 95, limits_of_dense_layers(half.config, 96)) == (2 * sparse + 96) / 3
