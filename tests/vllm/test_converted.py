"""What `nsa convert` writes is served: other families, and InfLLM-V2; tokens are those of generate()."""

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
from vllm_models import SIZES, engine, expected, greedy, prompts, save, save_tokenizer, spread, written

from nsa.cli import main

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
METHODS = {
    "nsa": ["--nsa.window-size", "64", "--nsa.num-selected-blocks", "4", "--gate-bias", "1"],
    "infllm_v2": [
        "--method", "infllm_v2", "--infllm-v2.dense-len", "0", "--infllm-v2.topk", "3", "--infllm-v2.window-size", "64",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "nsa") for family in FAMILIES), ("llama", "infllm_v2"), ("qwen3", "infllm_v2")]
)
def test_a_converted_model_writes_what_generate_writes(family, method, tmp_path):
    config, model, options = FAMILIES[family]
    sizes = {name: size for name, size in SIZES.items() if family != "qwen2" or name != "head_dim"}
    torch.manual_seed(0)
    spread(model(config(**sizes, **options))).save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--tokens", "0", *METHODS[method]]) == 0
    given = prompts(5, 40, 300, 517)
    llm = engine(tmp_path / "sparse", max_num_batched_tokens=256)
    assert written(greedy(llm, given, 12)) == expected(tmp_path / "sparse", given, 12)


def test_infllm_v2_has_prefix_hits_and_preemption_too(tmp_path):
    sizes = {"dense_len": 64, "topk": 3, "window_size": 64}
    folder = save(tmp_path / "model", "infllm_v2", infllm_v2=sizes)
    llm = engine(folder, max_num_batched_tokens=96, max_num_seqs=4, max_model_len=1024, num_gpu_blocks_override=6)
    (common,) = prompts(300, seed=4)
    given = [common + tail for tail in prompts(230, 7, 229, 215, seed=5)]
    found = [*greedy(llm, given[:1], 30), *greedy(llm, given[1:], 30)]
    assert [one.num_cached_tokens for one in found[1:]] == [256] * 3
    assert written(found) == expected(folder, given, 30)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_that_stay_dense_are_served_beside_sparse_ones(family, tmp_path):
    config, model, options = FAMILIES[family]
    torch.manual_seed(0)
    spread(model(config(**SIZES, **options))).save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    layers = ["--layers", "1", "--tokens", "0", *METHODS["nsa"]]
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), *layers]) == 0
    given = prompts(5, 300, 517)
    llm = engine(tmp_path / "sparse", max_num_batched_tokens=256)
    assert written(greedy(llm, given, 12)) == expected(tmp_path / "sparse", given, 12)
