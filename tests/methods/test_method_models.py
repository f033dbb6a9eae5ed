"""Methods under real decoders: families, batches, padding, generation, number formats, refusals."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa.eval.blocks import counted_keys, selections_of
from nsa.eval.methods import METHODS, MethodCache, attached, split
from nsa.eval.methods.nsa import NSA
from nsa.eval.methods.phased import Phased
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.testing.comparison import assert_close_to_fp64

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "max_position_embeddings": 128,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
NSA_SIZES = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4,
             "window_size": 10}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "dense twin": lambda: NSALlamaForCausalLM(NSALlamaConfig(**SIZES, attention="dense")),
}
LAID_OVER = [name for name, method in METHODS.items() if not method.native]
PROMPT, LENGTH = 40, 44


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return sharpened(FAMILIES[request.param]())


def sharpened(model):
    """Random weights attend almost evenly; larger ones tell keys apart."""
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data *= 6
    return model.double().eval().requires_grad_(False)


def tokens(rows=1, length=LENGTH):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def run(model, cache, ids, mask=None, prompt=PROMPT):
    """Logits of a prefill and single steps, as generate() calls the model."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = [prompt, *range(prompt + 1, ids.shape[1] + 1)]
    parts = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                    past_key_values=cache, use_cache=True)  # fmt: skip
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LAID_OVER)
def test_a_padded_row_gives_what_it_gives_alone(model, name, side):
    ids, mask = tokens(2), torch.ones(2, LENGTH, dtype=torch.long)
    padding = slice(0, 9) if side == "left" else slice(PROMPT - 9, PROMPT)  # the prompt's end; then it goes on
    ids[0, padding], mask[0, padding] = 0, 0
    method = METHODS[name].at_budget(split(LENGTH, 20))
    with attached(model):
        cache = MethodCache(method, model)
        together = run(model, cache, ids, mask)
        for row in range(2):
            own = ids[row : row + 1, mask[row].bool()]
            alone = MethodCache(method, model)
            truth = run(model, alone, own, prompt=own.shape[1] - (LENGTH - PROMPT))
            torch.testing.assert_close(together[row, mask[row].bool()], truth[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAID_OVER)
def test_a_budget_that_covers_the_context_equals_the_model_itself(model, name):
    ids, mask = tokens(2), torch.ones(2, LENGTH, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    with attached(model):
        cache = MethodCache(METHODS[name].at_budget(split(LENGTH, 1.0)), model)
        got = run(model, cache, ids, mask)
    assert model.config._attn_implementation != "nsa_method"
    truth = run(model, None, ids[:, :PROMPT], mask[:, :PROMPT]), model(ids, attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits  # fmt: skip
    torch.testing.assert_close(got[mask.bool()], truth[1][mask.bool()], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[:, :PROMPT][mask[:, :PROMPT].bool()], truth[0][mask[:, :PROMPT].bool()])
    counts = [cache.counts.per_query(phase)[0] for phase in ("prefill", "decode")]
    assert counts == pytest.approx([(33 * 17 + 40 * 20.5) / 73, (35.5 + 42.5) / 2])


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return sharpened(FAMILIES["llama"]())


@pytest.mark.parametrize("name", LAID_OVER)
def test_generate_works_with_batches_and_beams(llama, name):
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    method = METHODS[name].at_budget(split(30, 12))

    def generate(ids, mask, **more):
        with attached(llama):
            cache = MethodCache(method, llama)
            return llama.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False,
                                  **more)  # fmt: skip

    for more in ({}, {"num_beams": 3}):
        together = generate(ids, mask, **more)[:, 24:]
        alone = torch.cat(
            [generate(ids[:1, 5:], mask[:1, 5:], **more)[:, 19:], generate(ids[1:], mask[1:], **more)[:, 24:]]
        )
        assert together.tolist() == alone.tolist()


@pytest.mark.parametrize("name", LAID_OVER)
def test_beams_that_come_from_one_row_go_on_by_themselves(llama, name):
    method, ids = METHODS[name].at_budget(split(LENGTH, 20)), tokens(2)
    both = ids[:1, :PROMPT].repeat(2, 1)
    both = torch.cat([both, ids[:, PROMPT:]], 1)
    with attached(llama):
        cache = MethodCache(method, llama)
        llama(ids[:, :PROMPT], past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 0]))
        steps = [llama(both[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, LENGTH)]
        truth = run(llama, MethodCache(method, llama), both)[:, PROMPT:]
    torch.testing.assert_close(torch.cat(steps, 1), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAID_OVER)
def test_low_precision_stays_within_the_error_budget(name):
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval()
    ids = tokens()
    with torch.no_grad():
        model = model.to(torch.bfloat16)
        plain = model(ids).logits
        with attached(model):
            got = run(model, MethodCache(METHODS[name].at_budget(split(LENGTH, 1.0)), model), ids)
        truth = model.double()(ids).logits
    assert_close_to_fp64(got, plain, truth, name)


def test_phased_counts_keys_bytes_and_phases(llama):
    phased = Phased(llama, METHODS["exact_top"].at_budget(split(LENGTH, 20)))
    ids = tokens(2)
    logits = phased(ids, logits_to_keep=6, decode=4).logits
    with attached(llama):
        truth = run(llama, MethodCache(phased.method, llama), ids)
    torch.testing.assert_close(logits, truth[:, -6:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(phased(ids, logits_to_keep=2, decode=4).logits, truth[:, -2:], rtol=1e-9, atol=1e-9)
    summary = phased.meter.summary()
    assert summary["decode"]["queries"] == 2 * 2 * 4
    assert (summary["decode"]["attended"], summary["decode"]["scored"]) == pytest.approx((20.0, 42.5))
    assert summary["prefill"]["attended"] == pytest.approx((20 * 21 / 2 + 20 * 20) / 40)
    assert summary["cache_bytes"] == 3 * 2 * 2 * LENGTH * 8 * 8  # layers, keys and values, heads, tokens, dim, bytes
    assert summary["sequences"] == 4
    with pytest.raises(ValueError, match=r"expected decode from 0 to 43 .*, got 44"):
        phased(ids, decode=44)


@pytest.mark.parametrize("attention", ["nsa", "infllm_v2"])
def test_a_sparse_model_runs_natively_and_its_reads_are_counted(attention):
    torch.manual_seed(0)
    infllm_v2 = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 4, "topk": 3, "dense_len": 0}
    config = NSALlamaConfig(**SIZES, attention=attention, nsa=NSA_SIZES, infllm_v2=infllm_v2)
    model = sharpened(NSALlamaForCausalLM(config))
    phased = Phased(model, METHODS[attention]())
    ids = tokens(2)
    logits = phased(ids, logits_to_keep=6, decode=4).logits
    torch.testing.assert_close(logits, model(ids).logits[:, -6:], rtol=1e-9, atol=1e-9)
    layers = selections_of(model, ids[0].tolist())
    summary = phased.meter.summary()
    for phase, positions in (("prefill", range(PROMPT)), ("decode", range(PROMPT, LENGTH))):
        expected = sum(counted_keys(layers, i) for i in positions) / len(positions)
        assert summary[phase]["attended"] + summary[phase]["scored"] == pytest.approx(expected)
        assert (summary[phase]["scored"] > 0) == (attention == "infllm_v2")  # pooled keys only choose


def test_what_does_not_go_together_is_one_clear_line(llama):
    nsa = NSALlamaForCausalLM(NSALlamaConfig(**SIZES, attention="nsa", nsa=NSA_SIZES))
    with pytest.raises(ValueError, match=r"^quest replaces full attention; this model has attention='nsa'$"):
        Phased(nsa, METHODS["quest"]())
    with pytest.raises(
        ValueError, match=r"^the method nsa needs a model that has it \(attention='nsa'\), got attention=None$"
    ):
        Phased(llama, NSA())
    with attached(llama), pytest.raises(ValueError, match=r"needs past_key_values=MethodCache\(method, model\)"):
        llama(tokens())
    mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()
    with pytest.raises(ValueError, match=r"full attention; layer 0 has a sliding window of 16 and the text 44 tokens"):
        Phased(mistral, METHODS["full"]())(tokens())
    cache = MethodCache(METHODS["h2o"](), llama)
    with attached(llama):
        llama(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="h2o: tokens cannot be taken back"):
        cache.crop(-3)


def test_minference_gives_each_head_the_pattern_that_comes_closest(llama):
    method = METHODS["minference"].at_budget(split(LENGTH, 14))
    ids = tokens()
    prepared = method.prepare(llama, ids[0].tolist())
    assert [len(layer) for layer in prepared.patterns] == [4, 4, 4]
    assert prepared == method.prepare(llama, ids[0].tolist())
    outputs = {}

    def first_layer(patterns):
        kept = []
        hook = llama.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
        with attached(llama):
            llama(ids, past_key_values=MethodCache(patterns, llama))
        hook.remove()
        return kept[0].unflatten(-1, (4, 8))

    truth = first_layer(METHODS["full"]())
    for pattern in ("a_shape", "vertical_slash", "block_sparse"):
        alike = type(method)(**{**vars(method), "patterns": ((pattern,) * 4,) * 3})
        outputs[pattern] = (first_layer(alike) - truth).square().sum((0, 1, 3))
    for head, chosen in enumerate(prepared.patterns[0]):
        assert outputs[chosen][head] == min(error[head] for error in outputs.values())
