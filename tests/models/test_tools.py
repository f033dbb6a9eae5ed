"""Other libraries around the model; those that are not installed are skipped. docs/support.md is the list."""

import warnings

import pytest
import torch
import torch.distributed as dist
from tiny_llama import SIZES, TWINS, model, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

ENDS = {"max_new_tokens": 5, "do_sample": False}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.fixture
def tokenizer():
    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    made = Tokenizer(WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1", padding_side="right")


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("attention", TWINS)
def test_a_pipeline_generates_what_generate_does(attention, tokenizer):
    built = model(attention)
    prompts = ["w5 w6 w7", "w9 " * 25]
    together = pipeline("text-generation", model=built, tokenizer=tokenizer)(
        prompts, batch_size=2, return_full_text=False, **ENDS
    )
    for prompt, (answer,) in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = built.generate(ids, attention_mask=torch.ones_like(ids), **ENDS)[0, ids.shape[1] :]
        assert answer["generated_text"].split() == tokenizer.decode(alone, skip_special_tokens=True).split()


def offloaded_to_cpu(built, folder):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(built, execution_device=torch.device("cpu"))


def offloaded_to_disk(built, folder):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(built, folder / "offload", execution_device=torch.device("cpu"))


def loaded_with_a_device_map(built, folder):
    built.save_pretrained(folder)
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    where = {f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={**where, "lm_head": "cpu"}, offload_folder=folder / "offload", dtype=torch.float64
    )


@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("offload", [offloaded_to_cpu, offloaded_to_disk, loaded_with_a_device_map])
def test_offloaded_weights_compute_the_same(attention, offload, tmp_path):
    ids, built = tokens(2, 30), model(attention)
    with torch.no_grad():
        expected, continued = built(ids).logits, built.generate(ids, **ENDS)
        moved = offload(built, tmp_path)
        close(moved(ids).logits, expected)
        assert torch.equal(moved.generate(ids, **ENDS), continued)


LLAMAS_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("targets", [LLAMAS_SEVEN[:4], LLAMAS_SEVEN, "all-linear"], ids=["qkvo", "seven", "all"])
def test_an_adapter_changes_every_layer_it_stands_on_and_merges_to_the_same(attention, targets):
    peft = pytest.importorskip("peft")
    ids = tokens(2, 40)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model(attention), settings).double().eval()
    adapted(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name
    with torch.no_grad():
        unmerged, continued = adapted(ids).logits, adapted.generate(input_ids=ids, **ENDS)
        static = adapted.generate(input_ids=ids, cache_implementation="static", **ENDS)
        with adapted.disable_adapter():
            close(adapted(ids).logits, model(attention)(ids).logits)
        merged = adapted.merge_and_unload()
        close(merged(ids).logits, unmerged)
        assert torch.equal(merged.generate(ids, **ENDS), continued)
        assert torch.equal(static, continued)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("attention", TWINS)
def test_prompt_tuning_generates_with_a_cache_as_without(attention):
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    tuned, ids = peft.get_peft_model(model(attention), settings).double().eval(), tokens(2, 30)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **ENDS}
    assert torch.equal(tuned.generate(**given), tuned.generate(use_cache=False, **given))


def test_prefix_tuning_whose_cache_is_of_another_kind_is_one_line():
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model(), settings).double().eval()
    with pytest.raises(ValueError, match="needs an NSALlamaCache as past_key_values, got DynamicCache"):
        tuned(tokens(2, 30))


def quantized_by_torchao(built):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(built, quantization.Int8WeightOnlyConfig())


def quantized_by_quanto(built):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(built, weights=quanto.qint8)
    quanto.freeze(built)


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("quantize", [quantized_by_torchao, quantized_by_quanto])
def test_quantized_weights_are_those_of_its_linear_layers_rounded(attention, quantize):
    """Whatever a quantizer does to a Linear, the model computes with the weights that the Linear says it has."""
    built, rounded, ids = model(attention).float(), model(attention).float(), tokens(2, 40)
    quantize(built)
    with torch.no_grad():
        for name, module in built.named_modules():
            if isinstance(module, torch.nn.Linear):
                rounded.get_submodule(name).weight.copy_(module.weight.dequantize())
        assert not torch.equal(rounded(ids).logits, model(attention).float()(ids).logits)
        torch.testing.assert_close(built(ids).logits, rounded(ids).logits)
        assert torch.equal(built.generate(ids, **ENDS), rounded.generate(ids, **ENDS))


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("length", [30, 5])
def test_distributed_data_parallel_gives_the_gradients_of_one_process(attention, length, process_group):
    """Rows shorter than a block too, whose compression sees nothing."""
    built, ids = model(attention).train(), tokens(2, length)
    built(ids, labels=ids).loss.backward()
    wrapped = DistributedDataParallel(model(attention).train())
    for _ in range(2):  # what was not reduced is found by the next step
        wrapped.zero_grad()
        wrapped(ids, labels=ids).loss.backward()
    for mine, expected in zip(wrapped.parameters(), built.parameters(), strict=True):
        close(mine.grad, torch.zeros_like(mine) if expected.grad is None else expected.grad)


@pytest.mark.parametrize("attention", TWINS)
def test_fully_sharded_layers_train_and_generate_as_whole_ones(attention, process_group):
    built, sharded, ids = model(attention), model(attention), tokens(2, 30)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    for one in (built, sharded):
        one.train()(ids, labels=ids).loss.backward()
        one.eval()
    for mine, expected in zip(sharded.parameters(), built.parameters(), strict=True):
        close(mine.grad.full_tensor(), expected.grad)
    for kind in ("dynamic", "static") if attention == "nsa" else (None,):
        assert torch.equal(sharded.generate(ids, cache_implementation=kind, **ENDS), built.generate(ids, **ENDS))


def test_trl_trains_on_text(tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    texts = [" ".join(f"w{number}" for number in row) for row in tokens(8, 40).tolist()]
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, bf16=False, max_length=64, dataloader_pin_memory=False,
        gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": texts})
    trainer = trl.SFTTrainer(model=model().float(), args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
