"""The Hugging Face model: twins, packed rows, generation, files, training."""

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import NSA, SIZES, TWINS, model, tokens
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM


@pytest.mark.parametrize("attention", TWINS)
def test_packed_position_ids_keep_documents_apart(attention):
    built, ids = model(attention), tokens(1, 50)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with torch.no_grad():
        packed = built(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, 20:], built(ids[:, 20:]).logits, rtol=1e-9, atol=1e-9)


def test_a_mask_without_padding_leaves_packed_documents_apart():
    built, ids = model("nsa"), tokens(1, 50)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with torch.no_grad():
        packed = built(ids, torch.ones(1, 50), positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, 20:], built(ids[:, 20:]).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", TWINS)
def test_generation_equals_generation_without_a_cache(attention):
    built, ids = model(attention), tokens(2, 30)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(3)
        cached = built.generate(ids, max_new_tokens=15, **options)
        torch.manual_seed(3)
        assert torch.equal(cached, built.generate(ids, max_new_tokens=15, use_cache=False, **options))


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_generate_as_they_do_alone(attention, side):
    built, ids = model(attention), tokens(2, 30)
    mask = torch.ones_like(ids)
    (mask[0, :18] if side == "left" else mask[0, 12:]).zero_()
    together = built.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row in range(2):
        alone = built.generate(ids[row : row + 1, mask[row].bool()], max_new_tokens=12, do_sample=False)
        assert together[row, -12:].tolist() == alone[0, -12:].tolist()


@pytest.mark.parametrize("attention", TWINS)
def test_saved_and_loaded_by_the_auto_classes_it_is_the_same_model(attention, tmp_path):
    built, ids = model(attention).float(), tokens(1, 40)
    built.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is NSALlamaForCausalLM
    assert loaded.config.attention == attention
    assert loaded.config.nsa_config == built.config.nsa_config
    for name, parameter in built.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    # Not so the logits: a file's weights lie at other addresses, and sums of other vector widths round differently.
    truth = loaded.double()(ids).logits
    torch.testing.assert_close(truth, built.double()(ids).logits, rtol=1e-9, atol=1e-9)
    assert AutoConfig.from_pretrained(tmp_path).nsa["window_size"] == 10


def test_a_llama_checkpoint_loads_and_only_what_is_new_is_missing(tmp_path):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    llama.save_pretrained(tmp_path)
    config = NSALlamaConfig(attention="nsa", nsa=NSA, **SIZES)
    loaded, info = NSALlamaForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    new = ("_cmp.", "_win.", "compress_k.", "compress_v.", "g_proj.")
    assert info["missing_keys"]
    assert all("self_attn" in key and any(part in key for part in new) for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    attention = loaded.model.layers[1].self_attn
    assert torch.equal(attention.k_proj.weight, llama.model.layers[1].self_attn.k_proj.weight)
    assert (attention.g_proj.weight == 0).all()
    blocks = torch.randn(3, 8, 6)
    torch.testing.assert_close(attention.compress_k(blocks), blocks.mean(-2))


def test_the_dense_twin_is_llama_and_the_window_twin_sees_its_window_only(monkeypatch):
    # Llama's norm rounds to fp32 whatever x is.
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, 1e-6))
    ids = tokens(1, 60)
    dense = model("dense")
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    llama.load_state_dict(dense.state_dict())
    torch.testing.assert_close(dense(ids).logits, llama(ids).logits, rtol=1e-9, atol=1e-9)
    window = model("window", num_hidden_layers=1)
    changed = ids.clone()
    changed[0, 30] = 1
    same = (window(ids).logits == window(changed).logits).all(-1)[0]
    assert same[:30].all()
    assert not same[30:40].any()  # position 30 is inside the windows of queries 30 to 39, w = 10
    assert same[40:].all()


@pytest.mark.parametrize("attention", TWINS)
def test_gradient_checkpointing_changes_no_gradient(attention):
    built, ids = model(attention).train(), tokens(2, 40)

    def gradients():
        built.zero_grad()
        built(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in built.parameters()]

    plain = gradients()
    built.gradient_checkpointing_enable()
    for one, two in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_trainer_trains_saves_and_its_checkpoint_loads(tmp_path):
    built = model().float()
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 40)]
    arguments = TrainingArguments(
        tmp_path, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=8, report_to=[], logging_steps=1,
        disable_tqdm=True, use_cpu=True, save_steps=6, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=built, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(
        loaded.model.layers[0].self_attn.compress_k.out.weight, built.model.layers[0].self_attn.compress_k.out.weight
    )


def test_training_makes_no_cache_and_evaluation_does():
    built, ids = model(), tokens(1, 20)
    assert isinstance(built(ids).past_key_values, NSALlamaCache)
    assert built(ids).past_key_values.get_seq_length() == 20
    assert built.train()(ids).past_key_values is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NSALlamaConfig(attention="sparse"), r"one of \('nsa', 'infllm_v2', 'dense', 'window'\), got 'sparse'"),
        (lambda: NSALlamaConfig(nsa={"blocks": 3}), r"unknown keys \['blocks'\]"),
        (lambda: NSALlamaConfig(nsa={"compress_stride": 3}), "compress_stride"),
        (lambda: model()(tokens(1, 4), past_key_values=DynamicCache()), "needs an NSALlamaCache .* got DynamicCache"),
        (lambda: model().generate(tokens(1, 4), cache_implementation="offloaded", max_new_tokens=2), "'offloaded'"),
        (lambda: model()(tokens(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=True), "use_cache=False"),
        (lambda: model()(tokens(1, 4), position_ids=torch.arange(4), use_cache=False), r"\[b=1 or 1, t=4\], got \[4\]"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
