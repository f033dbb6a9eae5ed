"""The held-out text of these tests, and its tokenizers."""

import pytest
from rigged import write_text

from nsa.training.tokenizer import byte_tokenizer, train_bpe


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("held-out") / "text")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, text):
    from nsa.eval.text import held_out_text

    tokenizer = byte_tokenizer() if request.param == "bytes" else train_bpe([held_out_text(text)], 300)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]{% endfor %}[assistant] "
    return tokenizer
