"""The InfLLM-V2 layer and model: every split, padding and packing in every cache; a dense checkpoint unchanged."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.cache import NSACache, PagedNSACache, StaticNSACache
from nsa.config import InfLLMv2Config
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.modules.infllm_v2 import InfLLMv2Attention
from nsa.modules.rotary import rotate
from nsa.testing import brute_force_infllm_v2 as truth

CONFIG = InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=4, window_size=3, topk=3, dense_len=21)
CACHES = {
    "growing": lambda: NSACache(CONFIG.blocks),
    "static": lambda: StaticNSACache(CONFIG.blocks, 64),
    "paged": lambda: PagedNSACache(CONFIG.blocks, 20, page_size=16, max_length=64),
}
EXACT = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture
def layer() -> InfLLMv2Attention:
    return InfLLMv2Attention(16, 4, 2, 6, 4, CONFIG, bias=True).double()


def test_equals_the_brute_force_between_its_projections(layer):
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    with torch.no_grad():
        cos, sin = layer.rotary(x, torch.arange(40)[None])
        q, k = (rotate(proj(x).unflatten(-1, (-1, 6)), cos, sin)[0] for proj in (layer.q_proj, layer.k_proj))
        heads = truth.infllm_v2_attention(q, k, layer.v_proj(x)[0].unflatten(-1, (-1, 4)), CONFIG)
        torch.testing.assert_close(layer(x)[0], layer.o_proj(heads.flatten(1)), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_every_split_over_every_cache_is_the_whole(layer, cache):
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    whole = layer(x)
    for chunks in ([1] * 40, [40], [7, 1, 1, 20, 1, 10], [39, 1], [22, 18]):
        memory = CACHES[cache]()
        outs = [layer(part, cache=memory) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(outs, 1), whole, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_rows_of_unequal_length_over_every_cache_are_what_each_is_alone(layer, cache):
    x, memory = torch.randn(3, 40, 16, dtype=torch.float64), CACHES[cache]()
    mask = torch.arange(40) >= torch.tensor([[0], [25], [9]])
    mask[1, 30:33] = False
    outs = [
        layer(x[:, i : i + n], cache=memory, attention_mask=mask[:, i : i + n]) for i, n in [(0, 31), (31, 1), (32, 8)]
    ]
    out, whole = torch.cat(outs, 1), layer(x, attention_mask=mask)
    for row in range(3):
        alone = layer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(out[row : row + 1, mask[row]], alone, **EXACT)
        torch.testing.assert_close(whole[row : row + 1, mask[row]], alone, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_tokens_taken_back_leave_no_trace(layer, cache):
    x, memory = torch.randn(1, 40, 16, dtype=torch.float64), CACHES[cache]()
    layer(x[:, :30], cache=memory)
    layer(torch.randn(1, 9, 16, dtype=torch.float64), cache=memory)
    memory.crop(9)
    torch.testing.assert_close(layer(x[:, 30:], cache=memory), layer(x)[:, 30:], **EXACT)


def test_packed_sequences_are_what_each_is_alone_and_so_are_their_gradients(layer):
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 33, 33, 50, 80])
    parts = x.reshape(1, 80, 16).split([33, 17, 30], 1)
    alone = torch.cat([layer(part) for part in parts], 1).view(2, 40, 16)
    packed, d_out = layer(x, cu_seqlens=bounds), torch.randn(2, 40, 16, dtype=torch.float64)
    torch.testing.assert_close(packed, alone, **EXACT)
    for one, other in zip(
        *(torch.autograd.grad(y, [x, *layer.parameters()], d_out) for y in (packed, alone)), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


@torch.no_grad()
def test_select_says_what_the_brute_force_lists(layer):
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    cos, sin = layer.rotary(x, torch.arange(40)[None])
    q, k = (rotate(proj(x).unflatten(-1, (-1, 6)), cos, sin)[0] for proj in (layer.q_proj, layer.k_proj))
    scores, lists = layer.select(x)
    torch.testing.assert_close(scores[0], truth.block_scores(q, k, CONFIG), **EXACT)
    assert torch.equal(lists[0], truth.select_blocks(q, k, CONFIG, lists.shape[-1]))


def test_a_cache_of_other_sizes_is_refused(layer):
    other = InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=8, window_size=3, topk=3)
    with pytest.raises(ValueError, match="it was made for select_block_size=8, but the layer has select_block_size=4"):
        layer(torch.zeros(1, 1, 16, dtype=torch.float64), cache=NSACache(other.blocks))


# ---- dense checkpoints ---------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [{"dense_len": 40, "topk": 2}, {"dense_len": 0, "topk": 13}], ids=["dense_len", "all blocks fit"]
)
def test_a_dense_checkpoint_loads_unchanged_and_gives_its_logits_as_long_as_all_keys_are_read(tmp_path, sizes):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()
    llama.save_pretrained(tmp_path)
    config = NSALlamaConfig(attention="infllm_v2", infllm_v2={**CONFIG.to_dict(), **sizes}, **SIZES)
    built, info = NSALlamaForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(info.values()), info
    assert [name for name, _ in built.named_parameters()] == [name for name, _ in llama.named_parameters()]
    twin = NSALlamaForCausalLM.from_pretrained(tmp_path, config=NSALlamaConfig(attention="dense", **SIZES))
    ids = torch.randint(0, 48, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, dense = built.double().eval()(ids).logits, twin.double().eval()(ids).logits
        torch.testing.assert_close(ours[:, :40], dense[:, :40], **EXACT)
        assert (ours[:, 56:] - dense[:, 56:]).abs().amax() > 1e-6
        torch.testing.assert_close(built(ids[:, :40]).logits, dense[:, :40], **EXACT)
        # transformers' own Llama has its norms in fp32.
        torch.testing.assert_close(ours[:, :40].float(), llama(ids[:, :40]).logits, rtol=1e-4, atol=1e-4)


def test_sparse_config_of_minicpm_is_taken_as_it_is():
    given = {
        "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048, "topk": 64,
        "use_nope": False, "dense_len": 8192,
    }  # fmt: skip
    config = NSALlamaConfig(attention="infllm_v2", infllm_v2=given, **SIZES)
    assert config.infllm_v2_config == InfLLMv2Config()
    assert config.nsa_config == InfLLMv2Config().blocks
    for wrong, message in [({"use_nope": True}, "expected use_nope=False"), ({"topp": 1}, "unknown keys \\['topp'\\]")]:
        with pytest.raises(ValueError, match=message):
            NSALlamaConfig(attention="infllm_v2", infllm_v2=wrong, **SIZES)
