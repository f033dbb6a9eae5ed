"""Other libraries around a converted model; those that are not installed are skipped. docs/support.md is the list."""

import pytest
import torch
from dense_families import DENSE, NSA, SIZES, dense
from huggingface_hub import ModelCard
from quantizers import QUANTIZERS
from tiny_llama import tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    modeling_utils,
    pipeline,
)
from transformers.utils import hub

from nsa.models import swap_attention
from nsa.training.tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def chatty():
    torch.manual_seed(0)
    config = Qwen3Config(**{**SIZES, "vocab_size": 259, "max_position_embeddings": 512}, head_dim=8)
    return swap_attention(Qwen3ForCausalLM(config), nsa=NSA)


def test_a_chat_is_answered_by_its_template_which_is_saved_with_the_model(tokenizer, tmp_path):
    model, chat = chatty().eval(), [{"role": "user", "content": "Who wrote the sonnets that the sea sings?"}]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    (answer,) = pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path))(chat, **options)
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    assert answer["generated_text"][-1]["content"] == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"], ids=["named", "all"])
def test_an_adapter_is_merged_and_saved_beside_the_folder_that_it_belongs_to(targets, tmp_path):
    peft, ids = pytest.importorskip("peft"), tokens(2, 40)
    swap_attention(dense("qwen3"), nsa=NSA).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        moved = adapted(ids).logits
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(found(ids).logits, moved)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, moved)


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
@pytest.mark.parametrize("family", [name for name in DENSE if name != "phi3"])  # which PEFT does not know
def test_peft_puts_adapters_by_itself_where_it_does_in_the_dense_family(family, kind):
    peft = pytest.importorskip("peft")
    before, settings = dense(family), getattr(peft, kind)(task_type="CAUSAL_LM")
    after = swap_attention(before, nsa=NSA)
    found, expected = (
        peft.get_peft_model(model, settings).base_model.targeted_module_names for model in (after, before)
    )
    assert found == expected != []


def settings(trl, kind, folder, **more):
    return getattr(trl, kind)(
        str(folder), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, bf16=False, max_length=96, dataloader_pin_memory=False,
        gradient_checkpointing=False, **more,
    )  # fmt: skip


def test_trl_tunes_on_chats_and_its_checkpoint_is_a_whole_folder(tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    chats = [
        [{"role": "user", "content": f"{n} and {n}"}, {"role": "assistant", "content": f"{2 * n}"}] for n in range(8)
    ]
    trainer = trl.SFTTrainer(
        model=chatty(), args=settings(trl, "SFTConfig", tmp_path, save_steps=3), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"messages": chats}),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (tmp_path / "checkpoint-3" / "modeling_nsa.py").is_file()


def test_trl_learns_preferences(tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = {
        "prompt": [f"{n} and {n} is " for n in range(8)],
        "chosen": [str(2 * n) for n in range(8)],
        "rejected": [str(2 * n + 1) for n in range(8)],
    }
    trainer = trl.DPOTrainer(
        model=chatty(), ref_model=chatty(), args=settings(trl, "DPOConfig", tmp_path, save_strategy="no"),
        processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(pairs),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_trl_trains_a_reward_head_on_a_converted_folder(tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    chatty().save_pretrained(tmp_path / "sparse")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse", num_labels=1)
    pairs = {"chosen": [f"{n} is good" for n in range(8)], "rejected": [f"{n} is bad" for n in range(8)]}
    trainer = trl.RewardTrainer(
        model=model, args=settings(trl, "RewardConfig", tmp_path / "run", save_strategy="no"),
        processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(pairs),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_converted_folder_is_quantized_as_it_is_loaded(quantizer, tmp_path):
    """And computes with the weights that its linear layers then say they have."""
    settings, ids = QUANTIZERS[quantizer](), tokens(2, 40)
    swap_attention(dense("qwen3").float(), nsa=NSA).save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    plain, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    with torch.no_grad():
        changed = False
        for name, module in quantized.named_modules():
            if isinstance(module, torch.nn.Linear):
                before, after = plain.get_submodule(name).weight, module.weight.dequantize()
                changed |= not torch.equal(before, after)
                rounded.get_submodule(name).weight.copy_(after)
        assert changed
        torch.testing.assert_close(quantized(ids).logits, rounded(ids).logits)
        ends = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(quantized.generate(ids, **ends), rounded.generate(ids, **ends))


class Hub:
    """What transformers asks of a hub when it pushes."""

    def __init__(self):
        self.files = set()

    def create_repo(self, repo_id, **_):
        return type("Repository", (), {"repo_id": repo_id})

    def create_commit(self, operations, **_):
        self.files |= {operation.path_in_repo for operation in operations}


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_to_a_hub_loads_from_there(way, monkeypatch, tmp_path):
    hub_here, model = Hub(), swap_attention(dense("qwen3"), nsa=NSA)
    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: hub_here)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    if way == "push_to_hub":
        model.push_to_hub("me/sparse")
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/sparse")
    assert hub_here.files >= {"config.json", "generation_config.json", "model.safetensors", "modeling_nsa.py"}
