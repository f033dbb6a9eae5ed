"""A layer over block tables against the paper in loops: whatever an engine does with blocks, the numbers are one."""

import random

import pytest
import torch
from serving.engine import CONFIG, Engine, Row, Text, finished, variants

from nsa.serving.attend_few import attend_few
from nsa.serving.blocks import LayerBlocks, slots
from nsa.serving.step import Step


def ids(config):
    return f"{config.compression}-{'shared' if config.shared_kv else 'own'}-w{config.window_size}"


@pytest.mark.parametrize("config", variants(), ids=ids)
@pytest.mark.parametrize("chunks", [(75,), (1,) * 40, (17, 1, 1, 30, 16), (3, 5, 24, 20)], ids=str)
def test_every_split_into_chunks_and_steps_is_the_whole(config, chunks):
    engine, row = Engine(config), Row(Text(sum(chunks), config))
    for chunk in chunks:
        engine.step([(row, chunk)])
    finished(row)


def test_rows_of_all_lengths_come_and_go_together(cases):
    for seed in cases(8):
        draw = random.Random(seed)
        config = draw.choice(variants())
        rows = [Row(Text(draw.randint(1, 60), config, seed=i)) for i in range(draw.randint(1, 4))]
        engine = Engine(config)
        while any(row.computed < row.text.length for row in rows):
            if draw.random() < 0.1:
                engine.drop(draw.choice(rows))
            left = [(row, row.text.length - row.computed) for row in rows]
            work = [(row, min(draw.choice([0, 1, 1, 2, 16, 17, 30]), most)) for row, most in left]
            engine.step(work, padding=draw.choice([0, 0, 2]))
        for row in rows:
            finished(row)
            engine.drop(row)
        assert len(engine.free) == 63  # no block is lost


@pytest.mark.parametrize("config", variants(), ids=ids)
@pytest.mark.parametrize("common", [16, 40, 64])
def test_a_prefix_hit_equals_cold(config, common):
    engine = Engine(config)
    first = Row(Text(common, config))
    engine.step([(first, common)])
    second = Row(Text(common + 25, config, seed=1, prefix=first.text))
    engine.share(second, first)
    assert second.computed == common // 16 * 16
    engine.step([(second, common + 20 - second.computed)])
    for _ in range(5):
        engine.step([(second, 1)])
    finished(second)


def test_rejected_drafts_are_overwritten_by_position():
    kept = Text(32)
    engine, row = Engine(), Row(Text(60, seed=2, prefix=kept))
    engine.step([(row, 30)])
    engine.step([(row, 7)])  # drafts, of which the first two are kept
    row.text, row.computed, row.out = Text(60, seed=1, prefix=kept), 32, row.out[:32]
    for new in (3, 1, 20, 4):
        engine.step([(row, new)])
    finished(row)


def test_queries_are_attended_in_parts_where_they_gather_much(monkeypatch):
    monkeypatch.setattr("nsa.serving.attend_few.GATHERED", 1)
    engine, rows = Engine(), [Row(Text(length, seed=length)) for length in (5, 41, 23)]
    for count in (1, 1, 2, 1):
        engine.step([(row, count) for row in rows])
    for row in rows:
        finished(row)


def test_places_that_hold_nothing_are_0_for_kernels_that_load_them():
    engine, row = Engine(), Row(Text(20))
    for count in (2, 5, 13):  # the first stride is whole with the second step
        engine.step([(row, count)])
    block = row.tables["main"][0]
    for x in (engine.memory.k_cmp, engine.memory.v_cmp):
        assert not x[block, 0].any()
        assert x[block, 1:].isfinite().all()


def test_a_row_of_no_tokens_has_no_places_and_writes_nothing():
    table = torch.zeros(1, 2, dtype=torch.int32)
    assert slots(table, torch.zeros(3, dtype=torch.long), torch.tensor([-1, 0, 40]), 16).tolist() == [-1, -1, -1]
    step = Step(CONFIG, 16, [0, 0], [0], table, table, table)
    assert not len(step.token_slots)
    assert not len(step.compressed_slots)
    x = torch.zeros(1, 16, 2, 8)
    memory = LayerBlocks(x, x, x[:, :4], x[:, :4], x, x, x, x)
    out = attend_few(torch.zeros(0, 4, 8), torch.zeros(0, 4, 3), memory, step, step.rows, step.positions)
    assert out.shape == (0, 4, 8)


TABLE = torch.zeros(1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 20}, r"^block size: expected a multiple of select_block_size=8 \(l'\), got 20$"),
        ({"starts": [0, 3, 2], "lengths": [4, 4]}, r"^Step: starts should rise from 0, .* got \[0, 3, 2\]$"),
        ({"table_raw": TABLE[0]}, r"^Step: table_raw should have shape \[rows=1, blocks\], got \[1\]$"),
        ({"table_win": None}, r"^Step: expected table_win exactly where the window has its own keys and values$"),
        ({"starts": [0, 9]}, r"^Step: rows of \[4\] tokens cannot have \[9\] new ones$"),
    ],
)
def test_a_step_that_does_not_fit_is_one_line(given, said):
    fields = {"config": CONFIG, "size": 16, "starts": [0, 1], "lengths": [4], "table": TABLE, "table_win": TABLE,
              "table_raw": TABLE}  # fmt: skip
    with pytest.raises(ValueError, match=said):
        Step(**{**fields, **given})
