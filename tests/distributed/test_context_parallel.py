"""Context parallelism: values and gradients of several ranks are those of one process."""

import context_cases
import groups
import pytest
import torch

from nsa.distributed import ZigZag


@pytest.mark.parametrize("case", groups.cases_of(context_cases))
def test_ranks_together_are_one_process(together, case):
    assert together[case] == ""


def test_zigzag_parts_hold_every_token_once_and_padding_at_the_end():
    for size in (1, 2, 3):
        for length in (2 * size, 2 * size + 1, 17):
            parts = [ZigZag(rank, size).shard(torch.arange(length)[None], fill=-1) for rank in range(size)]
            padding = torch.full((ZigZag(0, size).padded(length) - length,), -1)
            everything = torch.cat(parts, 1).flatten()
            assert everything.sort().values.tolist() == torch.cat([padding, torch.arange(length)]).tolist()
            halves = [part.chunk(2, 1) for part in parts]
            in_order = torch.cat([low for low, _ in halves] + [high for _, high in reversed(halves)], 1)[0]
            assert in_order.tolist() == torch.cat([torch.arange(length), padding]).tolist()


def test_a_row_shorter_than_its_chunks_is_refused():
    with pytest.raises(ValueError, match=r"^context parallelism over 4 ranks: a row should have at least 8 tokens"):
        ZigZag(0, 4).shard_batch({"input_ids": torch.zeros(1, 7)})


def test_rows_with_padding_are_refused():
    with pytest.raises(ValueError, match=r"^context parallelism: expected rows without padding"):
        ZigZag(0, 2).shard_batch({"input_ids": torch.zeros(1, 8), "attention_mask": torch.ones(1, 8)})


def test_labels_are_moved_before_they_are_taken_apart():
    batch = {"input_ids": torch.arange(9)[None], "labels": torch.arange(9)[None], "weights": torch.arange(9.0)[None]}
    part = ZigZag(0, 2).shard_batch(batch)
    assert part["input_ids"].tolist() == [[0, 1, 2, 0, 0, 0]]  # chunks of three of nine tokens and three of padding
    assert part["shift_labels"].tolist() == [[1, 2, 3, -100, -100, -100]]
    assert part["weights"].tolist() == [[1, 2, 3, 0, 0, 0]]
