"""Tasks of lm-eval, where the package is installed (pip install nsa[lm-eval]): local data, every kind of request."""

import json
import subprocess
import sys

import pytest
import torch
from dense_families import NSA, SIZES
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nsa.eval.methods import METHODS, split
from nsa.eval.methods.phased import Phased
from nsa.eval.tasks.lm_eval import LMEval
from nsa.models import swap_attention
from nsa.training.tokenizer import byte_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports

QUESTIONS = [{"text": f"{name} is ", "choices": ["red", "green"], "label": i % 2} for i, name in enumerate("abcdef")]
SHARED = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
              "doc_to_target: '{{label}}'\nmetric_list: [{metric: acc}]\n",
    "predict": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
               "metric_list: [{metric: bits_per_byte}]\n",
    "write": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{choices[0]}}'\n"
             "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    for name, rest in TASKS.items():
        own = f"task: {name}\n" + SHARED.format(data=folder / "data.jsonl") + rest
        (folder / f"{name}.yaml").write_text(own)
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=128, **sizes)).eval()


@pytest.mark.parametrize("task", TASKS)
def test_a_method_that_reads_all_scores_as_the_model_itself(folder, model, task):
    judge = LMEval(task=task, samples=4, path=str(folder))
    plain = judge.run(model, byte_tokenizer())
    assert plain
    for name in ("full", "h2o", "infllm"):
        rows = judge.run(Phased(model, METHODS[name].at_budget(split(128, 1.0))), byte_tokenizer())
        assert [(row.where, row.n) for row in rows] == [(row.where, row.n) for row in plain]
        assert [row.value for row in rows] == pytest.approx([row.value for row in plain], rel=1e-4)


def test_a_small_budget_changes_what_is_predicted(folder, model):
    judge = LMEval(task="predict", samples=4, path=str(folder))
    phased = Phased(model, METHODS["streaming_llm"](sink=0, window=1))
    (row,) = judge.run(phased, byte_tokenizer())
    assert row.value != judge.run(model, byte_tokenizer())[0].value
    assert phased.meter.summary()["decode"]["attended"] == 1.0


def test_its_own_command_scores_a_converted_folder_as_the_model_does(folder, tmp_path):
    """As docs/support.md has it, in a process that imports nothing of nsa by itself."""
    dense = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "vocab_size": 259}, head_dim=8))
    sparse, tokenizer = swap_attention(dense.eval(), nsa=NSA), byte_tokenizer()
    sparse.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    command = f"""--model hf --model_args pretrained={tmp_path / "sparse"},trust_remote_code=True --tasks choose
        --include_path {folder} --device cpu --output_path {tmp_path / "out"} --log_samples"""
    caches = {name: str(tmp_path / "cache") for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_CACHE")}
    environment = {**caches, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "lm_eval", "run", *command.split()], capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_choose*.jsonl")
    for sample in map(json.loads, samples.read_text().splitlines()):
        for choice, ((score, _),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            text = f"{sample['doc']['text']} {choice}"
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                log_p = sparse(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            choice_tokens = len(text) - len(sample["doc"]["text"].rstrip())  # a space before it is the choice's
            assert float(score) == pytest.approx(log_p[-choice_tokens:].sum().item(), rel=1e-4)
