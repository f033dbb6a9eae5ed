"""docs/support.md: what it says to be shown by a test is, and what works or is refused has one."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (REPOSITORY / "docs/support.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| | |")
]


def test_every_line_names_tests_that_exist_or_says_that_it_was_not_tried():
    assert len(ROWS) > 40
    for what, said, shown in ROWS:
        names = re.findall(r"`(tests/\S+\.py)::(\w+)`", shown)
        assert bool(names) != said.startswith("not tried"), what
        for path, name in names:
            tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{what}: {name}"
