"""`nsa serve` on vLLM, asked by OpenAI's client over the loopback."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from vllm_models import CONTEXT, environment, expected, prompts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """Address, and what it printed, of a server that runs while the module's tests do."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "nsa", "serve", str(folders["nsa"]), "--port", str(port), "--dtype", "float32",
               "--api-key", "secret", "--memory", "0.25", "--name", "tiny"]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment())
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)  # between two questions: whether it is up is its own affair
        assert process.poll() is None, log.read_text()[-3000:]
        yield port, log
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="secret", max_retries=0)


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" if token > 1 else ("<pad>", "<bos>")[token] for token in tokens)


def test_it_says_where_it_listens(server):
    port, log = server
    assert f"nsa serve: tiny at http://127.0.0.1:{port}/v1 on vLLM 0.32" in log.read_text()


def test_a_stream_is_what_generate_writes(client, folders):
    given = prompts(300, seed=8)
    parts = client.completions.create(
        model="tiny", prompt=given[0], max_tokens=10, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    streamed = [part.choices[0].text for part in parts]
    assert len(streamed) > 1
    assert "".join(streamed).split() == text(expected(folders["nsa"], given, 10)[0]).split()


def test_a_stop_string_ends_an_answer_and_is_not_in_it(client, folders):
    given = prompts(60, seed=13)
    words = text(expected(folders["nsa"], given, 10)[0]).split()
    stop = words[5]
    answer = client.completions.create(
        model="tiny", prompt=given[0], max_tokens=10, temperature=0, stop=[stop],
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text.split() == words[: words.index(stop)]


def test_a_chat_streams_too(client):
    given = {"model": "tiny", "messages": [{"role": "user", "content": "w3 w4 w5"}], "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**given).choices[0].message.content
    parts = client.chat.completions.create(**given, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole


def test_a_chat_is_answered_by_a_model_that_knows_no_chats(client):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "w3 w4 w5"}], max_tokens=5, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize(
    "given", [{"prompt": [5] * (CONTEXT + 1)}, {"prompt": "w3", "max_tokens": -1}, {"prompt": "w3", "model": "other"}],
    ids=["too long", "negative", "another model"],
)  # fmt: skip
def test_a_bad_request_is_told_and_nobody_else_notices(client, given):
    with pytest.raises(openai.APIStatusError) as told:
        client.completions.create(**{"model": "tiny", "max_tokens": 5, **given})
    assert 400 <= told.value.status_code < 500
    assert client.completions.create(model="tiny", prompt="w3 w4", max_tokens=2).choices[0].text


def test_without_the_key_nobody_is_answered(server):
    other = openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        other.models.list()


def running(port: int) -> float:
    """Requests that the engine works on, as it reports them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_a_client_that_leaves_is_forgotten(server, client):
    parts = client.completions.create(
        model="tiny", prompt=prompts(200)[0], max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(parts))
    parts.close()
    while running(server[0]):  # until it is
        time.sleep(0.2)
    assert client.completions.create(model="tiny", prompt="w3 w4", max_tokens=2).choices[0].text


def test_a_port_in_use_is_one_line(server, folders):
    command = [sys.executable, "-m", "nsa", "serve", str(folders["nsa"]), "--port", str(server[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"nsa serve: error: cannot listen at 127.0.0.1:{server[0]}: Address already in use")
    assert done.stderr.count("\n") == 1
