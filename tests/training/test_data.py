"""Training batches: a function of seed and number, no row or loss across documents, held-out rows held out."""

import numpy as np
import pytest
import torch

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.curriculum import Stage, parse_curriculum, parse_stage
from nsa.training.data import (
    IGNORED,
    TrainingBatches,
    flatten,
    retrieval_batches,
    text_batches,
)
from nsa.training.documents import Documents
from nsa.training.readers import Document
from nsa.training.retrieval import is_held_out

ENCODE = str.encode
# Document i is made of letter i only, so that a token tells where it is from.
DOCUMENTS = Documents.from_texts(
    [Document(c, c * n) for c, n in zip("abcdefgh", (90, 33, 64, 10, 200, 65, 3, 31), strict=True)], ENCODE
)


ROWS_OF_32 = (Stage(length=32, steps=6),)


def batches(stages=ROWS_OF_32, *, layout="rows", seed=0, batch_tokens=128, **options):
    return TrainingBatches(
        DOCUMENTS, stages, batch_tokens, encode=ENCODE, filler="x = 1\n" * 50, seed=seed, layout=layout, **options
    )


def test_a_row_is_from_one_document():
    for item in batches(seed=3):
        assert item["input_ids"].shape == (4, 32)
        for row in item["input_ids"]:
            assert len(row.unique()) == 1


def test_a_pass_takes_every_full_row_once():
    stage = Stage(length=32, steps=3)
    rows = torch.cat([item["input_ids"] for item in batches((stage,), batch_tokens=4 * 32)])[:, 0].tolist()
    per_document = [n // 32 for n in DOCUMENTS.lengths]
    assert sum(per_document) == 13
    for i, count in enumerate(per_document):
        assert count - 1 <= rows.count(ord("abcdefgh"[i])) <= count


def test_pieces_of_the_flat_layout_restart_positions_and_predict_nothing_across():
    for item in batches(layout="flat", seed=1):
        ids, labels, positions = item["input_ids"][0], item["labels"][0], item["position_ids"][0]
        assert ids.shape == (128,)
        starts = (positions == 0).nonzero().flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], 128], strict=True):
            assert len(ids[begin:end].unique()) == 1
            assert positions[begin:end].tolist() == list(range(end - begin))
            assert labels[begin] == IGNORED
            assert torch.equal(labels[begin + 1 : end], ids[begin + 1 : end])


@pytest.mark.parametrize("documents", [1, 5, 62, 63, 64, 65, 128])
def test_a_packed_row_says_where_its_documents_lie_in_few_shapes(documents):
    sizes = [1 + 7 * i % 5 for i in range(documents)]
    starts = np.cumsum([0, *sizes])
    batch = flatten(torch.arange(starts[-1])[None], [starts[:-1].tolist()])
    bounds, positions = batch["cu_seq_lens_q"], batch["position_ids"][0]
    assert (bounds.dtype, bounds.device.type) == (torch.int32, "cpu")
    assert len(bounds) == {1: 64, 5: 64, 62: 64, 63: 64, 64: 128, 65: 128, 128: 256}[documents]
    assert bounds[: documents + 1].tolist() == starts.tolist()
    assert (bounds[documents:] == starts[-1]).all()  # what follows are documents of no tokens
    assert (positions == 0).nonzero().flatten().tolist() == bounds[:documents].tolist()
    assert batch["max_length_q"] == (1 if documents == 1 else 8)
    assert type(batch["max_length_q"]) is int


def test_the_batches_of_a_run_have_few_shapes():
    stages = (Stage(length=32, steps=6, retrieval=0.3), Stage(length=128, steps=4))
    items = list(batches(stages, layout="flat", batch_tokens=256))
    assert {tuple(item["cu_seq_lens_q"].shape) for item in items} == {(64,)}
    assert {item["max_length_q"] for item in items} == {32, 128}


def test_the_flat_layout_reads_every_token_of_every_document():
    total = len(DOCUMENTS.tokens)
    stage = Stage(length=32, steps=total // 32 + 1)
    seen = torch.cat([item["input_ids"][0] for item in batches((stage,), layout="flat", batch_tokens=32)])
    first_pass = np.bincount(seen[: total // 32 * 32].numpy(), minlength=128)
    whole = np.bincount(DOCUMENTS.tokens, minlength=128)
    assert (whole - first_pass >= 0).all()
    assert (whole - first_pass).sum() == total % 32


def test_a_batch_is_a_function_of_seed_and_number():
    stages = (Stage(length=64, steps=4, repeated=0.3, retrieval=0.4), Stage(length=128, steps=2, retrieval=0.5))
    first, again, other = batches(stages), batches(stages), batches(stages, seed=1)
    for i in (5, 0, 3):  # in any order
        assert torch.equal(first[i]["input_ids"], again[i]["input_ids"])
    assert any(not torch.equal(first[i]["input_ids"], other[i]["input_ids"]) for i in range(6))
    assert [first[i]["input_ids"].shape[1] for i in range(len(first))] == [64] * 4 + [128] * 2
    assert len(batches(stages, batches_per_step=3)) == 18


@pytest.mark.parametrize("attention", ["nsa", "infllm_v2", "dense", "window"])
def test_another_second_document_leaves_the_first_ones_loss(attention):
    sizes = {"compress_block_size": 4, "compress_stride": 2, "select_block_size": 4, "num_selected_blocks": 4}
    config = NSALlamaConfig(
        attention=attention,
        nsa=sizes | {"window_size": 8},
        infllm_v2={"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 4, "topk": 3, "dense_len": 0},
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = NSALlamaForCausalLM(config).train()
    first, second, third = torch.randint(64, (3, 40))
    losses = []
    for after in (second, third):
        batch = flatten(torch.cat([first, after])[None], [[0, 40]])
        labels = batch.pop("labels")
        logits = model(**batch).logits[0, :39]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:40], reduction="none"))
    alone = model(input_ids=first[None]).logits[0, :39]
    assert torch.equal(losses[0], losses[1])
    expected = torch.nn.functional.cross_entropy(alone, first[1:], reduction="none")
    torch.testing.assert_close(losses[0], expected)


def test_evaluation_rows_hold_answers_with_held_out_names_only():
    for item in retrieval_batches(ENCODE, "x = 1\n" * 50, 200, 400, 6, seed=0).batches:
        for ids, labels in zip(item["input_ids"], item["labels"], strict=True):
            text = bytes(ids.tolist()).decode()
            asked = [name for name in (line[2:4] for line in text.splitlines() if line.startswith("f("))]
            assert len(asked) == 4
            assert all(map(is_held_out, asked))
            assert (labels != IGNORED).sum() == 16
            assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])


def test_text_batches_are_rows_of_single_documents():
    rows = torch.cat([item["input_ids"] for item in text_batches(DOCUMENTS, 32, 64, 320).batches])
    assert rows.shape == (10, 32)
    assert all(len(row.unique()) == 1 for row in rows)


def test_a_corpus_too_small_for_one_sequence_is_an_error_with_sizes():
    message = r"too small for one sequence of 256 tokens: it has 496 tokens in 8 documents, the longest 200"
    with pytest.raises(ValueError, match=message):
        batches((Stage(length=256, steps=1),))


def test_stages_are_read_as_they_are_written():
    stage = Stage(length=512, steps=100, repeated=0.25, retrieval=0.5, keys=3, style="assert")
    assert parse_stage(str(stage)) == stage
    assert parse_curriculum(("32x5", "64x1:keys=1"))[1].keys == 1


@pytest.mark.parametrize(
    "text", ["", "32", "32x", "x5", "32x5:foo=1", "32x5:retrieval=2", "4x5", "32x0", "32x5:keys=a"]
)
def test_a_stage_that_cannot_be_read_is_an_error(text):
    with pytest.raises(ValueError, match="curriculum stage"):
        parse_stage(text)
