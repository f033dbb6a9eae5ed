"""What was judged as a table: a line a place, a column a recipe, its seeds in one cell."""

from collections.abc import Sequence

from nsa.eval.judged import Judged, Rows, interval_of, places
from nsa.eval.result import paired_difference
from nsa.eval.seeds import over_seeds
from nsa.eval.table import Block, Line, cell, chances_of, own_and_shared, summed
from nsa.eval.tasks.task import Row


def judged_blocks(judged: Judged, reference: str | None) -> list[Block]:
    """Needle grids are summed over the depths, seed by seed."""
    blocks = []
    for task in judged.tasks:
        columns = {
            name: {seed: summed(rows) for seed, rows in column.of_task(task).items()}
            for name, column in judged.columns.items()
        }
        found = places(rows for seeds in columns.values() for rows in seeds.values())
        own, shared = own_and_shared([row.where for row in found.values()])
        lines = []
        for where, text in zip(found, own, strict=True):
            here = {name: _at(seeds, where) for name, seeds in columns.items()}
            others = here.get(reference or "", {})
            lines.append(Line(text, [_cell(rows, {} if name == reference else others) for name, rows in here.items()]))
        title = ", ".join(filter(None, [shared, chances_of(list(found.values()))]))
        blocks.append(Block(f"{task}: {title}" if title else task, lines))
    return blocks


def _at(seeds: Rows, where: str) -> dict[int | None, Row]:
    """Each seed's row in one place, where there is one."""
    return {seed: row for seed, rows in seeds.items() for row in rows if str(row.where) == where and row.n}


def _cell(own: dict[int | None, Row], reference: dict[int | None, Row]) -> tuple[str, str]:
    """Of one seed as in `nsa eval`; of several the mean and its interval over seeds, of losses that of differences."""
    shared = [seed for seed in own if seed in reference and seed is not None]
    rows = list(own.values())
    if not rows:
        return "–", "no result"
    if len(rows) == 1:
        other = reference[shared[0]] if shared else next(iter(reference.values()), None)
        return cell(rows[0], other if len(reference) == 1 or shared else None)
    value, low, high = interval_of(rows)
    if rows[0].is_share:
        right = sum(sum(row.values) for row in rows)
        return f"{value:.1%}", f"{right:g}/{sum(row.n for row in rows)} ({100 * low:.0f}-{high:.0%})"
    if not shared:
        return f"{value:.3f}", f"{low:.3f} to {high:.3f}"
    differences = [paired_difference(own[seed], reference[seed]) for seed in shared]
    if len(shared) == 1:
        return f"{value:.3f}", f"{differences[0][0]:+.3f} ± {differences[0][1]:.3f}, seed {shared[0]}"
    return f"{value:.3f}", between([difference for difference, _ in differences], digits=3)


def between(differences: Sequence[float], digits: int = 4) -> str:
    """Mean of differences over seeds, and its 95% interval."""
    mean, low, high = over_seeds(differences)
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
