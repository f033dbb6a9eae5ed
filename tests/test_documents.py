"""What the documents say is so: their code runs, the page of public names is whole, the README stays short."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(page, block, id=f"{page}-{number}")
    for page in ("README.md", "docs/recipes.md")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_the_code_of_a_page_runs(page, block):
    if "import peft" in block:
        pytest.importorskip("peft")
    exec(compile(block, page, "exec"), {"__name__": "page"})


def test_the_page_of_public_names_is_whole():
    """And holds none that is gone; `python docs/api.py` writes it."""
    expected = runpy.run_path(str(ROOT / "docs" / "api.py"))["page"]()
    said, written = (re.findall(r"^(?:## `|\* `)([\w.]+)", text, re.M) for text in (
        expected, (ROOT / "docs" / "api.md").read_text(encoding="utf-8"),
    ))  # fmt: skip
    assert written == said


def test_the_readme_can_be_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
