"""What the report shows without a chart: needle maps, strips of blocks, the text that one query selected."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nsa.eval.pictures import BlockPicture, Head
from nsa.eval.result import Result
from nsa.report.table import format_number

# Brown, cream, teal: ordered for every kind of colour vision, and readable on light and dark pages.
_STOPS = ((0xB8, 0x5C, 0x38), (0xF1, 0xE4, 0xCB), (0x0F, 0x76, 0x6E))


def needle_maps(result: Result) -> dict[str, Any]:
    """One heat map a model; nothing without needles."""
    maps = []
    for name in result.names:
        rows = [row for row in result.of_task(name, "needle") if row.n]
        scores = {(row.where["length"], row.where["depth"]): (row.correct or 0, row.n) for row in rows}
        if scores:
            maps.append((name, heat_map(scores, title=f"needle heat map of {name}")))
    prompts = max((row.n for name in result.names for row in result.of_task(name, "needle")), default=0)
    return {"maps": maps, "prompts": prompts} if "needle" in result.tasks else {}


def heat_map(scores: Mapping[tuple[int, float], tuple[int, int]], *, title: str) -> dict[str, Any]:
    """Counts of right answers (right, prompts) by (length in tokens, depth of the needle from 0 to 1), as a grid."""
    lengths = sorted({length for length, _ in scores})

    def cell(length: int, depth: float) -> dict[str, str] | None:
        if (length, depth) not in scores:
            return None
        right, n = scores[length, depth]
        share = right / n if n else 0.0
        tip = f"{format_number(length)} tokens, needle at {depth:.0%}: {right} of {n}"
        return {"share": f"{share:.0%}", "color": color_of(share), "ink": ink_on(share), "tip": tip}

    depths = sorted({depth for _, depth in scores})
    rows = [(f"{depth:.0%}", [cell(length, depth) for length in lengths]) for depth in depths]
    return {"title": title, "lengths": [format_number(length) for length in lengths], "rows": rows}


def color_of(share: float) -> str:
    """0 -> brown, 1 -> teal."""
    share = min(1.0, max(0.0, share))
    low, high, t = (*_STOPS[:2], share * 2) if share < 0.5 else (*_STOPS[1:], share * 2 - 1)
    return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(low, high, strict=True))


def ink_on(share: float) -> str:
    """The class of text on `color_of(share)`: black or white, whichever has the higher contrast (WCAG 2)."""
    channels = (int(color_of(share)[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "dark" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "light"


def selected_blocks(picture: BlockPicture) -> dict[str, Any]:
    """Which blocks the last query selected, per layer and group, along the text; and the text."""
    tokens = len(picture.pieces)
    middle = 100 * sum(picture.needle) / 2 / tokens
    return {
        "tokens": tokens,
        "answer": picture.answer.strip(),
        "block_size": picture.block_size,
        "window_size": picture.window_size,
        "found": picture.found,
        "strips": [(head.name, block_strip(head, picture)) for head in picture.heads],
        "half": format_number(tokens // 2),
        "all": format_number(tokens),
        "middle": f"{middle:.1f}",
        "edge": "first" if middle < 6 else "last" if middle > 94 else "",
        "text": list(
            marked_text(picture.pieces, picture.counts, top=len(picture.heads), needle=picture.needle,
                        block_size=picture.block_size)
        ),
    }  # fmt: skip


def block_strip(head: Head, picture: BlockPicture) -> dict[str, Any]:
    """One layer and KV head group: the score of every block, and a bar under the selected ones; x in tokens."""
    chosen, always = set(head.selected), set(head.forced)
    top = max((s for b, s in enumerate(head.scores) if b not in always), default=0.0) or 1.0
    tokens, blocks = len(picture.pieces), []
    for block, start in enumerate(range(0, tokens, picture.block_size)):
        width = min(picture.block_size, tokens - start)
        score = head.scores[block] if block < len(head.scores) else 0.0
        kind = "forced" if block in always else "chosen" if block in chosen else ""
        tip = f"block {block}, tokens {start} to {start + width - 1}: score {score:.3f}"
        tip += {"forced": ", always selected", "chosen": ", selected by score", "": ", not selected"}[kind]
        opacity = f"{min(1.0, max(score, 0.0) / top) ** 0.5:.2f}"
        blocks.append({"start": start, "width": width, "opacity": opacity, "kind": kind, "tip": tip})
    first, last = picture.needle
    return {"tokens": tokens, "blocks": blocks, "needle": first, "needle_width": max(1, last - first)}


def marked_text(
    pieces: Sequence[str],
    counts: Sequence[int],
    *,
    top: int,
    needle: tuple[int, int],
    block_size: int,
    context: int = 240,
) -> Iterator[dict[str, Any]]:
    """The prompt itself: each block shaded by how many (layer, group) pairs selected it, the needle framed.

    Args:
        pieces: the text of every token.
        counts: per block, how many of `top` pairs selected it by score.
        needle: the needle's tokens [first, last).
        context: tokens of an unselected stretch that are kept at each of its ends; the middle is left out.
    """
    num_blocks = -(-len(pieces) // block_size)
    near = {b for b in range(num_blocks) if b < len(counts) and counts[b]}
    near |= set(range(needle[0] // block_size, (needle[1] - 1) // block_size + 1)) | {0, num_blocks - 1}
    reach, hidden = max(1, context // block_size), 0
    for block in range(num_blocks):
        start, end = block * block_size, min(len(pieces), (block + 1) * block_size)
        if not any(abs(block - other) <= reach for other in near):
            hidden += end - start
            continue
        if hidden:
            yield {"gap": format_number(hidden)}
            hidden = 0
        count = counts[block] if block < len(counts) else 0
        first, last = (min(max(edge, start), end) for edge in needle)
        parts = [(pieces[start:first], False), (pieces[first:last], True), (pieces[last:end], False)]
        yield {
            "gap": "",
            "tip": f"block {block}: selected by {count} of {top}",
            "shade": f"background:rgba(var(--nsa-rgb),{0.08 + 0.4 * count / max(top, 1):.2f})" if count else "",
            "texts": [("".join(part), marked) for part, marked in parts if part],
        }
