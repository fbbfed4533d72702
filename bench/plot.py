"""Results of ``dpo bench`` as a picture: a row of bars for each scenario, as SVG text.

To draw another number, add a panel to ``PANELS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from dpo.bench.results import PARTS, Measurement

NAMES, PANEL, BAR = 170, 325, 210  # widths: of the names, of a panel, of its longest bar
TOP, ROW, THICK = 88, 24, 14  # heights: of the heads, of a row, of a bar
COLORS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#9a9a9a")  # told apart by all eyes


@dataclass(frozen=True, slots=True)
class Panel:
    """A column of bars.

    Attributes:
        title: what is drawn.
        bars: lengths of the pieces of a scenario's bar, by name.
        text: beside the bar.
        limit: the length that fills the panel; None for that of the longest bar.
    """

    title: str
    bars: Callable[[Measurement], Mapping[str, float]]
    text: Callable[[Measurement], str]
    limit: float | None = None


def _mfu(row: Measurement) -> str:
    share = row.datasheet_share
    return f"{row.mfu:.0%}" if share is None else f"{row.mfu:.0%} ({share:.0%})"


def _parts(row: Measurement) -> dict[str, float]:
    whole = sum(row.split.values())
    return {part: row.split.get(part, 0.0) / whole for part in PARTS}


PANELS: Final = (
    Panel(
        "useful tokens/s",
        lambda row: {"": row.useful_tokens_per_s},
        lambda row: f"{row.useful_tokens_per_s:,.0f}",
    ),
    Panel("MFU (of the datasheet's rate)", lambda row: {"": row.mfu}, _mfu, limit=1.0),
    Panel("a step", _parts, lambda row: f"{row.median_seconds:.3g} s", limit=1.0),
    Panel(
        "peak memory",
        lambda row: {
            "weights, gradients, optimizer": row.state_mib,
            "above": max(row.peak_mib - row.state_mib, 0.0),
        },
        lambda row: f"{row.peak_mib:,.0f} MiB",
    ),
)

_STYLE: Final = """
text { font: 12px system-ui, sans-serif; fill: #1c2330; }
.title { font-size: 15px; font-weight: 600; }
.head { font-weight: 600; }
.faint { font-size: 11px; fill: #5b6472; }
"""


def plot(rows: Sequence[Measurement], *, title: str) -> str:
    """Draw the results of some scenarios, at least one, as an SVG document."""
    width, height = NAMES + PANEL * len(PANELS), TOP + ROW * len(rows) + 10
    parts = [f'<text class="title" x="10" y="24">{escape(title)}</text>']
    for number, row in enumerate(rows):
        y = TOP + ROW * number + THICK - 3
        parts.append(
            f'<text x="{NAMES - 10}" y="{y}" text-anchor="end">{escape(row.scenario)}</text>'
        )
    for number, panel in enumerate(PANELS):
        parts += _draw(panel, rows, left=NAMES + PANEL * number)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _draw(panel: Panel, rows: Sequence[Measurement], *, left: float) -> Iterator[str]:
    bars = [panel.bars(row) for row in rows]
    longest = panel.limit or max(sum(bar.values()) for bar in bars) or 1.0
    yield f'<text class="head" x="{left}" y="54">{escape(panel.title)}</text>'
    yield from _legend(list(bars[0]), left)
    for number, (row, bar) in enumerate(zip(rows, bars, strict=True)):
        y, x = TOP + ROW * number, left
        for color, length in zip(COLORS, bar.values(), strict=False):
            size = min(length / longest, 1.0) * BAR
            yield f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{THICK}" fill="{color}"/>'
            x += size
        yield f'<text x="{x + 5:.1f}" y="{y + THICK - 3}">{escape(panel.text(row))}</text>'


def _legend(names: Sequence[str], left: float) -> Iterator[str]:
    """Name the colours, if a bar has pieces."""
    x = left
    for color, name in zip(COLORS, names, strict=False):
        if name:
            yield f'<rect x="{x}" y="63" width="9" height="9" fill="{color}"/>'
            yield f'<text class="faint" x="{x + 12}" y="71">{escape(name)}</text>'
            x += 18 + 6 * len(name)
