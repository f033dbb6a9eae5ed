"""position_ids: where packed sequences begin, and the angles of the rotation."""

from functools import partial

import pytest
import torch

from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.positions import packed_boundaries
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.rotary import RotaryEmbedding

TINY = {
    "nsa": {
        "compress_block_size": 8, "compress_stride": 4, "select_block_size": 16, "num_selected_blocks": 4,
        "window_size": 24,
    },
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
EXACT = {"rtol": 0.0, "atol": 1e-9}


class ExactRotary(RotaryEmbedding):
    """As Llama's is called; that one rounds angles to fp32."""

    def forward(self, x, position_ids):
        return super().forward(x, position_ids)


def model() -> NSALlamaForCausalLM:
    torch.manual_seed(0)
    built = NSALlamaForCausalLM(NSALlamaConfig(attention="nsa", **TINY)).double().eval()
    for owner, name in ((built.model, "rotary_emb"), *((layer.self_attn, "rotary") for layer in built.model.layers)):
        setattr(owner, name, ExactRotary(16))
    return built


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(1, 64, (rows, columns), generator=torch.Generator().manual_seed(1))


def alone(built: NSALlamaForCausalLM, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits of documents one by one."""
    return torch.cat([built(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("lengths", [[1, 70], [1, 1, 1, 40], [30, 41], [8, 7, 1, 55]])
@pytest.mark.parametrize("training", [True, False])
def test_a_document_begins_wherever_the_step_is_not_one(lengths, training):
    built, ids = model().train(training), tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    torch.testing.assert_close(built(ids, position_ids=positions).logits, alone(built.eval(), ids, lengths), **EXACT)


def test_a_document_need_not_begin_at_zero_and_rows_may_differ():
    """Rotary attention sees differences of positions only."""
    built, ids = model(), tokens(2, 60)
    positions = torch.stack([torch.cat([torch.arange(20), torch.arange(5, 45)]), torch.arange(100, 160)])
    expected = torch.cat([alone(built, ids[:1], [20, 40]), alone(built, ids[1:], [60])])
    torch.testing.assert_close(built(ids, position_ids=positions, use_cache=False).logits, expected, **EXACT)


def test_padding_of_a_packed_row_is_no_part_of_its_documents():
    built, ids = model(), tokens(1, 60)
    positions = torch.cat([torch.arange(25), torch.arange(30), torch.zeros(5, dtype=torch.long)])[None]
    mask = (torch.arange(60) < 55).long()[None]
    actual = built(ids, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(actual[:, :55], alone(built, ids[:, :55], [25, 30]), **EXACT)


def test_evaluation_honours_packing_and_leaves_no_cache_behind():
    built, ids = model(), tokens(1, 60)
    positions = torch.cat([torch.arange(20), torch.arange(40)])[None]
    out = built(ids, position_ids=positions, labels=ids)
    assert out.past_key_values is None
    cu = torch.tensor([0, 20, 60], dtype=torch.int32)
    torch.testing.assert_close(out.loss, built(ids, labels=ids, cu_seq_lens_q=cu, max_length_q=64).loss, **EXACT)
    with pytest.raises(ValueError, match=r"^NSALlamaModel: packed sequences leave no cache behind; expected use_cache"):
        built(ids, position_ids=positions, use_cache=True)


def test_the_layer_rotates_by_the_positions_it_is_given():
    layer = model().model.layers[0].self_attn
    x = torch.randn(1, 50, 64, dtype=torch.float64)
    nsa = partial(NativeSparseAttention.forward, layer)
    stretched = nsa(x, position_ids=10 * torch.arange(50)[None])
    assert (stretched - nsa(x)).abs().max() > 1e-3
    torch.testing.assert_close(nsa(x, position_ids=3 + torch.arange(50)[None]), nsa(x), **EXACT)


def test_over_a_cache_other_positions_than_the_next_ones_are_refused():
    built, ids = model(), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    cache = NSALlamaCache(built.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = built(ids, attention_mask=mask, use_cache=False).logits
    first = built(
        ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], past_key_values=cache
    ).logits
    torch.testing.assert_close(first[1], whole[1, :20], **EXACT)
    with pytest.raises(ValueError, match=r"position_ids should go on from its lengths, \[11, 20\]; leave them out"):
        built(ids[:, 20:], attention_mask=mask, position_ids=positions[:, 20:] + 1, past_key_values=cache)
    rest = built(ids[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 20:], **EXACT)


def test_boundaries_count_through_all_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]])
    cu, longest = packed_boundaries(positions, None, 2, 5)
    assert cu.tolist() == [0, 3, 5, 10]
    assert longest == 5
    assert packed_boundaries(torch.arange(5)[None], None, 2, 5) == (None, None)
