"""Tiny models for vLLM, what transformers says they write, and engines for them."""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM

VOCABULARY = 64
CONTEXT = 2048
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": CONTEXT,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def save(folder: Path, attention: str, nsa: dict[str, object] | None = None, **options) -> Path:
    """Two layers in fp32."""
    torch.manual_seed(0)
    nsa = {"window_size": 64, "num_selected_blocks": 4, **(nsa or {})}
    config = NSALlamaConfig(attention=attention, nsa=nsa, **{**SIZES, **options})
    spread(NSALlamaForCausalLM(config)).save_pretrained(folder)
    return save_tokenizer(folder)


def spread(model):
    """Far from its initialisation, so that what it writes depends on all it reads."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def save_tokenizer(folder: Path) -> Path:
    words = {word: number for number, word in enumerate(["<pad>", "<bos>", *(f"w{i}" for i in range(2, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def expected(folder: Path, given: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of generate(), padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    longest = max(map(len, given))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in given])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in given])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[:, longest:].tolist()


def engine(folder: Path, **options):
    from vllm import LLM

    given = {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT, "max_num_seqs": 64, "seed": 0}
    return LLM(str(folder), **{**given, "kv_cache_memory_bytes": 1 << 28, "skip_tokenizer_init": True, **options})


def greedy(llm, given: list[list[int]], count: int) -> list:
    """vLLM's outputs, in the order of the prompts."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in given], parameters, use_tqdm=False)


def written(outputs: list) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def pool(llm):
    """The scheduler's pool of blocks."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def environment() -> dict[str, str]:
    """Of a server in a process of its own."""
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
