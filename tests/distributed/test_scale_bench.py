"""`nsa bench scale` without a GPU: what it counts, and the document's tables, which it has made."""

from pathlib import Path

import groups
import pytest
import scale_cases

from nsa.bench.scale_arguments import ScaleArguments
from nsa.bench.scale_on_paper import text


@pytest.mark.parametrize("case", groups.cases_of(scale_cases))
def test_the_benchmark(together, case):
    assert together[case] == ""


def test_the_tables_on_paper_are_the_documents():
    document = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    assert text(ScaleArguments()) in document
