"""Other libraries around a converted model; those that are not installed are skipped. docs/support.md is the list."""

import pytest
import torch
from dense_families import NSA, SIZES, dense, tokens
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, pipeline

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


def test_peft_takes_targets_by_name_and_knows_none_by_itself():
    peft = pytest.importorskip("peft")
    ids = tokens(2, 40)
    for targets in (["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"):
        settings = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = peft.get_peft_model(swap_attention(dense("qwen3"), nsa=NSA), settings).double().eval()
        with torch.no_grad():
            moved = adapted(ids).logits
            torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, moved)
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(swap_attention(dense("qwen3"), nsa=NSA), peft.LoraConfig(task_type="CAUSAL_LM"))


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
