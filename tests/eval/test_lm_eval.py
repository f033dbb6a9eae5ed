"""Tasks of lm-eval, where the package is installed (pip install nsa[lm-eval]): local data, every kind of request."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.eval.methods import METHODS, split
from nsa.eval.methods.phased import Phased
from nsa.eval.tasks.lm_eval import LMEval
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
