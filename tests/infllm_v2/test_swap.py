"""Dense models of every family with InfLLM-V2 in the place of their attention: the same weights, the same function."""

import pytest
import torch
from dense_families import DENSE, dense
from tiny_llama import tokens

from nsa.config import InfLLMv2Config
from nsa.models import NSALlamaCache, swap_attention
from nsa.modules.infllm_v2 import InfLLMv2Attention

SIZES = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 4, "topk": 3, "dense_len": 20}


@pytest.fixture(scope="module", params=DENSE)
def pair(request):
    before = dense(request.param)
    return before, swap_attention(before, "infllm_v2", infllm_v2=SIZES)


def test_a_swapped_model_has_the_dense_ones_parameters_and_no_others(pair):
    before, after = pair
    storages = {parameter.untyped_storage().data_ptr() for parameter in before.parameters()}
    assert all(parameter.untyped_storage().data_ptr() in storages for parameter in after.parameters())
    assert sum(x.numel() for x in after.parameters()) == sum(x.numel() for x in before.parameters())
    layers = [after.model.layers[number].self_attn for number in after.config.sparse_layers]
    assert layers
    assert all(isinstance(layer, InfLLMv2Attention) and layer.config.to_dict() == {**SIZES, "init_blocks": 1,
               "coarse_lse": False} for layer in layers)  # fmt: skip


@torch.no_grad()
def test_its_logits_are_the_dense_ones_up_to_dense_len_and_others_after_it(pair):
    before, after = pair
    ids = tokens(2, 50)
    one, other = before(ids).logits.float(), after(ids).logits.float()
    torch.testing.assert_close(other[:, :20], one[:, :20])
    assert (other[:, 20:] - one[:, 20:]).abs().max() > 1e-5
    everything = swap_attention(before, "infllm_v2", infllm_v2=InfLLMv2Config.from_dict({**SIZES, "dense_len": 50}))
    torch.testing.assert_close(everything(ids).logits.float(), one)


@torch.no_grad()
def test_every_split_is_the_whole(pair):
    _, after = pair
    ids, cache = tokens(2, 40), NSALlamaCache(after.config)
    outs = [after(part, past_key_values=cache, use_cache=True).logits for part in ids.split([25, 1, 1, 13], 1)]
    torch.testing.assert_close(torch.cat(outs, 1), after(ids, use_cache=False).logits, rtol=1e-6, atol=1e-6)
