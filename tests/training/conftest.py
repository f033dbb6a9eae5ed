"""Fixtures of the tiny run."""

import pytest
from runs import tiny


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    return path


@pytest.fixture
def config(text, tmp_path):
    return tiny(text, tmp_path)
