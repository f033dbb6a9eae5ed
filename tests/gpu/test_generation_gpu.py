"""Decoding on a GPU: every layout and split with the kernels, CUDA graphs, generate()."""

from itertools import pairwise

import pytest
import torch
from step_checks import USES, check_begin, check_project, check_rms_norm
from torch import Tensor

from nsa import NativeSparseAttention, NSACache, NSAConfig
from nsa.backend import use_backend
from nsa.cache import LayerCache, PagedNSACache, StaticNSACache, convert
from nsa.kernels.decode_append import decode_append_kernel
from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.captured_step import CapturedStep
from nsa.models.plan import plan
from nsa.testing import assert_close_to_fp64

pytestmark = pytest.mark.gpu

CONFIG = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=5, window_size=100
)
PAGE = 64
LAYOUTS = ("growing", "static", "paged")


def layer(config: NSAConfig = CONFIG) -> NativeSparseAttention:
    """With gates and phi away from where they start, so that nothing cancels."""
    attention = NativeSparseAttention(128, 8, 2, 32, 64, config)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return attention.cuda()


def new_cache(layout: str, config: NSAConfig = CONFIG) -> LayerCache:
    if layout == "growing":
        return NSACache(config)
    if layout == "static":
        return StaticNSACache(config, 700)
    return PagedNSACache(config, 40, page_size=PAGE, max_length=700)


def split(
    attention: NativeSparseAttention, x: Tensor, chunks: list[int], cache: LayerCache, mask: Tensor | None = None
):
    outs = []
    for start, stop in pairwise([0, *torch.tensor(chunks).cumsum(0).tolist()]):
        seen = None if mask is None else mask[:, :stop]
        outs.append(attention(x[:, start:stop], cache=cache, attention_mask=seen))
    return torch.cat(outs, dim=1)


def compare(attention: NativeSparseAttention, found: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """With the operations on the whole, in the same dtype and in fp64."""
    with use_backend("torch"):
        plain = attention(x, attention_mask=mask)
        truth = attention.double()(x.double(), attention_mask=mask)
    assert_close_to_fp64(found, plain, truth, largest_score=100.0)


@pytest.mark.parametrize("chunks", [[300], [299, 1], [100, 200], [1, 150, 100] + [1] * 49, [20] + [7] * 40], ids=len)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_whole_is_chunks_is_decoding_in_every_layout(chunks, layout, padded, dtype) -> None:
    # Rounding to bf16 may turn a selection over, here or in PyTorch; at this seed both do so alike.
    torch.manual_seed(6)
    attention, x = layer().to(dtype), torch.randn(2, 300, 128, device="cuda", dtype=dtype)
    mask = torch.arange(300, device="cuda") >= torch.tensor([[0], [170]], device="cuda") if padded else None
    with use_backend("triton"):
        found = split(attention, x, chunks, new_cache(layout), mask)
    compare(attention, found, x, mask)


@pytest.mark.parametrize("layout", ["static", "paged"])
@pytest.mark.parametrize("around", [PAGE, 256, 512])
@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_every_length_around_page_boundaries(layout, around, steps) -> None:
    attention, x = layer(), torch.randn(1, around + 20, 128, device="cuda")
    with use_backend("triton"):
        chunks = [around - 19] + [steps] * (39 // steps)
        found = split(attention, x, chunks, new_cache(layout))
    compare(attention, found, x[:, : sum(chunks)])


@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("shared_kv", [False, True])
@torch.no_grad()
def test_every_compression_and_shared_keys(compression, shared_kv) -> None:
    config = NSAConfig.from_dict({**CONFIG.to_dict(), "compression": compression, "shared_kv": shared_kv})
    attention, x = layer(config), torch.randn(3, 250, 128, device="cuda")
    with use_backend("triton"):
        found = split(attention, x, [200, *[1] * 34, 16], new_cache("static", config))
    compare(attention, found, x)


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_conversion_in_the_middle(layout, target) -> None:
    attention, x = layer(), torch.randn(2, 200, 128, device="cuda")
    with use_backend("triton"):
        cache = new_cache(layout)
        first = split(attention, x[:, :150], [120, *[1] * 30], cache)
        rest = split(attention, x[:, 150:], [*[1] * 20, 30], convert(cache, new_cache(target)))
    compare(attention, torch.cat([first, rest], dim=1), x)


@torch.no_grad()
def test_rows_forked_from_one_prompt_share_its_pages() -> None:
    attention, prompt = layer(), torch.randn(1, 150, 128, device="cuda")
    x = torch.randn(4, 60, 128, device="cuda")
    with use_backend("triton"):
        cache = new_cache("paged")
        attention(prompt, cache=cache)
        cache.reorder(torch.zeros(4, dtype=torch.long))
        found = split(attention, x, [*[1] * 30, 30], cache)
    assert cache.num_pages_used == 2 + 4 * 2
    with use_backend("torch"):
        whole = torch.cat([prompt.expand(4, -1, -1), x], dim=1)
        plain = attention(whole)[:, 150:]
        truth = attention.double()(whole.double())[:, 150:]
    assert_close_to_fp64(found, plain, truth, largest_score=100.0)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 2048, 5216), (8, 8192, 2048), (16, 1408, 200)])
def test_the_products_of_a_step_are_within_the_budget(use, dtype, rows, width, columns) -> None:
    check_project(rows, width, columns, use, dtype, "cuda")
    check_rms_norm(rows, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "counts"), [(1, None), (1, (0, 1, 1, 1)), (6, (6, 0, 3, 1))])
def test_a_step_begins_within_the_budget(t, counts, dtype) -> None:
    check_begin((0, 3, 64, 900001), t, counts, dtype, "cuda")


@torch.no_grad()
def test_a_cache_of_another_length_compiles_no_append_again() -> None:
    attention, x, counts = layer(), torch.randn(2, 301, 128, device="cuda"), []
    for length in (310, 700, 5000):
        cache = StaticNSACache(CONFIG, length)
        with use_backend("triton"):
            split(attention, x, [300, 1], cache)
        counts.append(len(decode_append_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts[0] > 0
    assert len(set(counts)) == 1, counts


# ---- the model and its graphs ------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32, **kwargs) -> NSALlamaForCausalLM:
    config = NSALlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, initializer_range=0.1,
        nsa=CONFIG.to_dict(), bos_token_id=1, eos_token_id=None, pad_token_id=0, **kwargs,
    )  # fmt: skip
    return NSALlamaForCausalLM(config).cuda().eval().to(dtype)


def model_cache(built: NSALlamaForCausalLM, layout: str) -> NSALlamaCache:
    sizes = {"static": {"max_length": 700}, "paged": {"num_pages": 40, "page_size": PAGE, "max_length": 700}}
    return NSALlamaCache(built.config, layout=layout, **sizes.get(layout, {}))


@pytest.mark.parametrize("layout", ["static", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_replay_is_the_step_bit_by_bit_also_after_the_cache_grew(layout, dtype) -> None:
    """200 replays: past several pages, blocks and turns of the rings; a row of length 0 pads the batch."""
    built, ids = model(dtype), torch.randint(97, (3, 300), device="cuda")
    mask = torch.ones(3, 300, dtype=torch.long, device="cuda")
    mask[1, :60], mask[2], mask[0, 150:170] = 0, 0, 0
    found = []
    for capture in (True, False):
        cache = model_cache(built, layout)
        built(ids[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
        decoder = CapturedStep(built, cache, masked=True, capture=capture)
        logits = [decoder(ids[:, at : at + 1], mask[:, : at + 1]) for at in range(100, 300)]
        found.append(torch.cat(logits, dim=1))
        assert (decoder.graph is not None) == capture
        assert [one.lengths for one in cache.caches] == [[280, 240, 0]] * 2
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", ["static", "paged"])
@torch.no_grad()
def test_replays_give_what_the_whole_gives(layout) -> None:
    built, ids = model(), torch.randint(97, (3, 300), device="cuda")
    with use_backend("triton"):
        cache = model_cache(built, layout)
        first = built(ids[:, :200], past_key_values=cache).logits
        decoder = CapturedStep(built, cache, masked=False)
        found = torch.cat([first, *(decoder(ids[:, at : at + 1]) for at in range(200, 300))], dim=1)
    with use_backend("torch"):
        plain = built(ids, use_cache=False).logits
        truth = built.double()(ids, use_cache=False).logits
    assert_close_to_fp64(found, plain, truth, largest_score=100.0)


@pytest.mark.parametrize("layout", ["static", "paged"])
@torch.no_grad()
def test_crop_and_reorder_between_replays(layout) -> None:
    built, ids = model(), torch.randint(97, (2, 300), device="cuda")
    found = []
    for capture in (True, False):
        cache = model_cache(built, layout)
        built(ids[:, :250], past_key_values=cache)
        decoder, logits = CapturedStep(built, cache, masked=False, capture=capture), []
        for at in range(250, 300):
            logits.append(decoder(ids[:, at : at + 1]))
            if at % 7 == 0:
                cache.crop(-3)
            if at % 5 == 0:
                cache.reorder_cache(torch.tensor([1, at % 2], device="cuda"))
                assert decoder.serves(ids[:, :1], None)
        found.append(torch.cat(logits, dim=1))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("layout", ["static", "paged"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_no_decoding_step_waits_for_the_device(layout, masked) -> None:
    built, ids = model(torch.bfloat16), torch.randint(97, (3, 200), device="cuda")
    mask = torch.ones(3, 200, dtype=torch.long, device="cuda") if masked else None
    cache = model_cache(built, layout)
    built(ids[:, :120], past_key_values=cache)
    decoder = CapturedStep(built, cache, masked=masked)

    def steps(first: int) -> None:
        for at in range(first, first + 35):
            seen = None if mask is None else mask[:, : at + 1]
            if at % 2:
                decoder(ids[:, at : at + 1], seen)
            else:
                built(ids[:, at : at + 1], attention_mask=seen, past_key_values=cache)

    steps(120)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(155)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"prefill_chunk_size": 64}], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_by_graphs_is_that_without_and_that_of_the_operations(options, side) -> None:
    built, ids = model(), torch.randint(2, 97, (2, 300), device="cuda")
    mask = torch.ones_like(ids)
    (mask[0, :120] if side == "left" else mask[0, 180:]).zero_()
    made = []
    for graphs, backend in ((True, "auto"), (False, "auto"), (False, "torch")):
        torch.manual_seed(3)
        given = {"do_sample": False, "attention_mask": mask, "max_new_tokens": 30, **options}
        with use_backend(backend):
            made.append(built.generate(ids, cuda_graphs=graphs, **given))
        assert built.decode_path == ("CUDA graphs" if graphs else "no CUDA graphs: cuda_graphs=False")
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_assisted_generation_by_graphs() -> None:
    built, ids = model(), torch.randint(2, 97, (1, 300), device="cuda")
    assistant = model()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    assisted = built.generate(ids, assistant_model=assistant, max_new_tokens=40, do_sample=False)
    assert built.decode_path == "CUDA graphs"
    assert "assistant" in assistant.decode_path
    assert torch.equal(assisted, built.generate(ids, max_new_tokens=40, do_sample=False, cuda_graphs=False))


def test_what_the_kernels_do_not_take_is_decoded_without_graphs_and_says_so() -> None:
    built, ids = model(torch.float64), torch.randint(2, 97, (1, 50), device="cuda")
    built.generate(ids, max_new_tokens=3, do_sample=False)
    assert "PyTorch operations decode: expected one dtype of float32" in built.decode_path
    with pytest.raises(ValueError, match=r"cuda_graphs=True\) cannot be: PyTorch operations decode"):
        built.generate(ids, max_new_tokens=3, cuda_graphs=True)
    small = model()
    small.generate(ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert small.decode_path.endswith("hidden states are to be returned")


@pytest.mark.parametrize(("rows", "context", "chunk"), [(2, 65536, 2048), (2, 65536, 8192), (1, 1 << 20, 32768)])
@torch.no_grad()
def test_a_long_prompt_stays_within_the_plan(rows, context, chunk) -> None:
    """The peak of a prompt read in chunks by generate(), cache and all, against what `nsa info` says."""
    config = NSALlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=1 << 21, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    built = NSALlamaForCausalLM(config).cuda().eval().bfloat16()
    ids = torch.randint(1000, (rows, context), device="cuda")
    peaks = []
    for length in (2 * chunk, context):  # the first compiles the kernels and makes the libraries' workspaces
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = built.generate(ids[:, :length], max_new_tokens=1, prefill_chunk_size=chunk, return_dict_in_generate=True)
        assert out.past_key_values.get_seq_length() == length
        del out
        peaks.append(torch.cuda.max_memory_allocated() - before)
    planned = plan(config, context=context + 17, batch=rows, chunk=chunk, dtype=torch.bfloat16)["NSA"]
    assert peaks[-1] <= sum(planned.cache_bytes.values()) + planned.prefill_bytes
