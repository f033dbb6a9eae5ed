"""Tensor parallelism: values and gradients of ranks that share heads are those of one process."""

import groups
import pytest
import tensor_cases

from nsa.distributed.tensor import check_heads


@pytest.mark.parametrize("case", groups.cases_of(tensor_cases))
def test_ranks_that_share_heads_are_one_process(together, case):
    assert together[case] == ""


def test_more_ranks_than_kv_heads_is_one_line():
    expected = (
        r"^tensor parallelism: a rank holds whole KV heads; expected a divisor of the 2 KV heads .*, got 4 ranks$"
    )
    with pytest.raises(ValueError, match=expected):
        check_heads(4, 2)


def test_a_saved_configuration_leaves_the_plan_to_the_code(tmp_path):
    tensor_cases.model().save_pretrained(tmp_path)
    assert "tp_plan" not in (tmp_path / "config.json").read_text()
