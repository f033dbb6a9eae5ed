"""Maps of the report: needle heat maps, and where in the text the blocks of one query lie."""

from collections.abc import Mapping, Sequence
from html import escape

from nsa.eval.svg import format_number

# Brown, cream, teal: ordered for every kind of colour vision, and readable on light and dark pages.
_STOPS = ((0xB8, 0x5C, 0x38), (0xF1, 0xE4, 0xCB), (0x0F, 0x76, 0x6E))
CELL_WIDTH, CELL_HEIGHT = 74, 38


def heat_map(scores: Mapping[tuple[int, float], tuple[int, int]], *, title: str) -> str:
    """Counts of right answers by (length in tokens, depth of the needle from 0 to 1), as a coloured grid.

    Args:
        scores: (length, depth) -> (right answers, prompts).
        title: for screen readers; the page sets its own heading.
    """
    lengths = sorted({length for length, _ in scores})
    depths = sorted({depth for _, depth in scores})
    width, height = 62 + CELL_WIDTH * len(lengths) + 4, 8 + CELL_HEIGHT * len(depths) + 46
    parts = []
    for row, depth in enumerate(depths):
        y = 8 + row * CELL_HEIGHT
        base = f"{y + CELL_HEIGHT / 2 + 4:.1f}"
        parts.append(f'<text class="tick" x="54" y="{base}" text-anchor="end">{depth:.0%}</text>')
        for column, length in enumerate(lengths):
            if (length, depth) not in scores:
                continue
            right, n = scores[length, depth]
            share = right / n if n else 0.0
            x = 62 + column * CELL_WIDTH
            parts.append(
                f"<g><title>{format_number(length)} tokens, needle at {depth:.0%}: {right} of {n}</title>"
                f'<rect x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" rx="5" '
                f'fill="{color_of(share)}"/><text x="{x + CELL_WIDTH / 2}" y="{y + CELL_HEIGHT / 2 + 4.5:.1f}" '
                f'text-anchor="middle" class="{ink_on(share)}">{share:.0%}</text></g>'
            )
    bottom = 8 + CELL_HEIGHT * len(depths)
    for column, length in enumerate(lengths):
        middle = 62 + (column + 0.5) * CELL_WIDTH
        name = format_number(length)
        parts.append(f'<text class="tick" x="{middle}" y="{bottom + 17}" text-anchor="middle">{name}</text>')
    middle = 62 + CELL_WIDTH * len(lengths) / 2
    parts.append(f'<text class="label" x="{middle}" y="{bottom + 37}" text-anchor="middle">length in tokens</text>')
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(13 {4 + bottom / 2}) rotate(-90)">depth</text>'
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{int(width * 1.15)}px">{"".join(parts)}</svg>'
    )


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
    return "cell" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "cell light"


def block_strip(
    scores: Sequence[float],
    selected: Sequence[int],
    forced: Sequence[int],
    *,
    block_size: int,
    num_tokens: int,
    needle: tuple[int, int],
) -> str:
    """One layer and KV head group of one query: the score of every block, and a bar under the selected ones.

    The strip stretches to the width of its column; one unit of x is one token.
    """
    chosen, always = set(selected), set(forced)
    top = max((s for b, s in enumerate(scores) if b not in always), default=0.0) or 1.0
    parts = [f'<rect x="0" y="0" width="{num_tokens}" height="70" class="strip"/>']
    for block in range((num_tokens + block_size - 1) // block_size):
        start = block * block_size
        width = min(block_size, num_tokens - start)
        score = scores[block] if block < len(scores) else 0.0
        opacity = min(1.0, (max(score, 0.0) / top)) ** 0.5
        kind = "forced" if block in always else "chosen" if block in chosen else ""
        tip = f"block {block}, tokens {start} to {start + width - 1}: score {score:.3f}"
        tip += {"forced": ", always selected", "chosen": ", selected by score", "": ", not selected"}[kind]
        parts.append(f'<g><title>{tip}</title><rect x="{start}" y="0" width="{width}" height="70" class="score" ')
        parts.append(f'opacity="{opacity:.2f}"/>')
        if kind:
            parts.append(f'<rect x="{start}" y="76" width="{width}" height="24" class="{kind}"/>')
        parts.append("</g>")
    first, last = needle
    parts.append(f'<rect x="{first}" y="0" width="{max(1, last - first)}" height="70" class="needle"/>')
    return (
        f'<svg class="blocks" viewBox="0 0 {num_tokens} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="block scores and selected blocks">{"".join(parts)}</svg>'
    )


def marked_text(
    pieces: Sequence[str],
    counts: Sequence[int],
    *,
    top: int,
    needle: tuple[int, int],
    block_size: int,
    context: int = 240,
) -> str:
    """The prompt itself: each block shaded by how many (layer, group) pairs selected it, the needle framed.

    Args:
        pieces: the text of every token.
        counts: per block, how many of `top` pairs selected it by score.
        needle: the needle's tokens [first, last).
        context: tokens of an unselected stretch that are kept at each of its ends; the middle is left out.
    """
    parts: list[str] = []
    num_blocks = (len(pieces) + block_size - 1) // block_size
    near = {b for b in range(num_blocks) if b < len(counts) and counts[b]}
    near |= set(range(needle[0] // block_size, (needle[1] - 1) // block_size + 1)) | {0, num_blocks - 1}
    reach = max(1, context // block_size)
    hidden = 0
    for block in range(num_blocks):
        start, end = block * block_size, min(len(pieces), (block + 1) * block_size)
        if not any(abs(block - other) <= reach for other in near):
            hidden += end - start
            continue
        if hidden:
            parts.append(f'<span class="gap">… {format_number(hidden)} tokens …</span>')
            hidden = 0
        count = counts[block] if block < len(counts) else 0
        shade = f"background:rgba(var(--nsa-rgb),{0.08 + 0.4 * count / max(top, 1):.2f})" if count else ""
        parts.append(f'<span title="block {block}: selected by {count} of {top}" style="{shade}">')
        for position in range(start, end):
            if position == needle[0] or (position == start and needle[0] < start < needle[1]):
                parts.append('<mark class="needle-text">')
            parts.append(escape(pieces[position]))
            if position + 1 == needle[1] or (position + 1 == end and needle[0] < end < needle[1]):
                parts.append("</mark>")
        parts.append("</span>")
    return f'<pre class="prompt">{"".join(parts)}</pre>'
