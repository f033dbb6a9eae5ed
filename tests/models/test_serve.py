"""`transformers serve`, as docs/support.md starts it; skipped where its packages are not installed."""

import json

import pytest
import torch
import transformers
from tiny_llama import SIZES, TWINS, model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from nsa.models import NSALlamaForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")  # of those packages
MESSAGES = [{"role": "user", "content": " ".join(f"w{3 + number % 40}" for number in range(60))}]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def client(tmp_path, monkeypatch):
    """client(attention, ...) of a server whose model lies in tmp_path; nothing listens at a port."""
    for package in ("openai", "uvicorn"):
        pytest.importorskip(package)
    testclient = pytest.importorskip("fastapi.testclient")
    from transformers.cli.serve import Serve

    monkeypatch.setattr(transformers, "NSALlamaForCausalLM", NSALlamaForCausalLM, raising=False)
    monkeypatch.setattr(Serve, "start_server", lambda self: None)

    def start(attention, **options):
        words = Tokenizer(WordLevel({f"w{number}": number for number in range(SIZES["vocab_size"])}, unk_token="w3"))
        words.pre_tokenizer = WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        tokenizer.save_pretrained(tmp_path)
        model(attention).save_pretrained(tmp_path)
        served = Serve(force_model=str(tmp_path), device="cpu", dtype="float64", non_blocking=True, **options)
        return testclient.TestClient(served.server.config.app)

    return start


def ask(client, path, **body):
    answer = client.post(path, json={"generation_config": json.dumps(GREEDY), **body})
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("attention", TWINS)
def test_a_server_answers_what_generate_does_whole_and_streamed(attention, client, tmp_path):
    server = client(attention)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", return_dict=True).input_ids
    out = model(attention).generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    chat = {"path": "/v1/chat/completions", "model": str(tmp_path), "messages": MESSAGES}
    whole = ask(server, **chat, stream=False).json()["choices"][0]["message"]["content"]
    lines = ask(server, **chat, stream=True).text.split("\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert whole.split() == streamed.split() == expected.split()
    assert len(chunks) > 5


def test_a_server_refuses_continuous_batching_in_one_line(client, tmp_path):
    server = client("nsa", continuous_batching=True)
    with pytest.raises(ValueError, match="continuous batching is not served by this model") as caught:
        ask(server, "/v1/chat/completions", model=str(tmp_path), messages=MESSAGES)
    assert "\n" not in str(caught.value)
