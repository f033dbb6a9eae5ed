"""torch.compile, bf16 autocast and gradient checkpointing together, where several processes train."""

import compiled_cases
import groups
import pytest


@pytest.fixture(scope="module")
def results():
    return groups.run("compiled_cases")


@pytest.mark.parametrize("case", groups.cases_of(compiled_cases))
def test_gradients_are_those_of_one_process(results, case):
    assert not results[case], pytest.fail(results[case], pytrace=False)
