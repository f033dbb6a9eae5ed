"""A decoding step over fixed storage against the paper in loops, in fp64."""

import pytest
from serving.engine import Engine, Row, Text, finished, variants
from serving.fixed import Fixed


def ids(config):
    return f"{config.compression}-{'shared' if config.shared_kv else 'own'}-w{config.window_size}"


@pytest.mark.parametrize("config", variants(), ids=ids)
@pytest.mark.parametrize("t", [1, 3])
def test_steps_of_rows_that_begin_anywhere_are_the_whole(config, t):
    engine = Engine(config)
    starts = (0, 2, 7, 30, 41)
    rows = [Row(Text(start + 4 * t, config, seed=start)) for start in starts]
    engine.step([(row, start) for row, start in zip(rows, starts, strict=True) if start])
    fixed = Fixed(engine, 7, t, 5, rows[0].text.phi, spare=1)
    for _ in range(4):
        fixed.step(rows)
    for row in rows:
        finished(row)


def test_rejected_drafts_are_overwritten_by_position():
    kept = Text(33)
    engine, row = Engine(), Row(Text(60, seed=2, prefix=kept))
    engine.step([(row, 30)])
    fixed = Fixed(engine, 2, 9, 5, row.text.phi)
    fixed.step([row])
    row.text, row.computed, row.out = Text(60, seed=1, prefix=kept), 33, row.out[:33]
    for _ in range(3):
        fixed.step([row])
    finished(row)
