"""The data doctor's findings as one HTML page, without scripts and without anything from outside.

Shapes: N rows that can be trained on and have two answers, B bins.
"""

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from dpo.data.doctor import DoctorReport, Finding, Lengths, told_count
from dpo.data.doctor_checks import CHECKS

_BINS = 30
_SHOWN = 20  # findings of one check
_WIDTH, _HEIGHT, _BOTTOM, _LEFT = 640, 240, 200, 44


def doctor_page(report: DoctorReport) -> str:
    """Return the page."""
    parts = [
        f"<p class=soft>{report.rows:,} rows in {escape(', '.join(map(str, report.files)))}</p>",
        _section("Checks", _check_table(report)),
        _section("Lengths of the answers", _lengths(report.lengths)),
        *_finding_sections(report),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>Preference pairs, examined</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>Preference pairs, examined</h1>{''.join(parts)}</main></body></html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _check_table(report: DoctorReport) -> str:
    rows = "".join(
        f"<tr class={report.policies[check] if count else 'none'}><td>{check}</td>"
        f"<td class=n>{told_count(check, count)}</td><td>{report.policies[check]}</td>"
        f"<td>{escape(CHECKS[check].summary)}</td></tr>"
        for check, count in report.counts().items()
    )
    return _table("<th>check<th class=n>rows<th>policy<th>what is wrong", rows)


def _table(head: str, rows: str) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def _lengths(lengths: Lengths) -> str:
    if not len(lengths.chosen):
        return f"<p>{escape(lengths.describe())}</p>"
    return (
        f"<p>{escape(lengths.describe())}</p>"
        "<p class=legend><i class=a></i>chosen <i class=b></i>rejected</p>"
        f"{_histogram([lengths.chosen, lengths.rejected], f'length in {lengths.unit}')}"
        "<h3>Chosen minus rejected</h3>"
        f"{_histogram([lengths.chosen - lengths.rejected], f'difference in {lengths.unit}')}"
    )


def _histogram(series: Sequence[NDArray[np.int64]], label: str) -> str:
    """Draw shares of rows by value, side by side; the end bins take what lies beyond them."""
    edges = _edges(np.concatenate(series))  # (B + 1,)
    shares = [
        np.histogram(values.clip(edges[0], edges[-1] - 0.5), edges)[0] / len(values)
        for values in series
    ]
    top = max(float(share.max()) for share in shares)
    parts = [
        f'<text x="{_LEFT - 6}" y="14" text-anchor="end">{top:.0%}</text>',
        f'<text x="{_LEFT - 6}" y="{_BOTTOM}" text-anchor="end">0</text>',
        f'<text x="{_WIDTH // 2}" y="{_HEIGHT - 4}" text-anchor="middle">'
        f"{escape(label)}; the end bins take what is beyond</text>",
        *(_tick(edges, index) for index in range(0, len(edges), 5)),
    ]
    for number, share in enumerate(shares):
        parts += _bars(share / top, "ab"[number], number, len(shares))
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _edges(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return about ``_BINS`` edges at round numbers that hold all but the outermost values."""
    low, high = np.percentile(values, [0.5, 99.5])
    rough = max((high - low) / _BINS, 1.0)
    power = 10 ** int(np.log10(rough))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = int(low // width), int(high // width) + 1
    edges: NDArray[np.int64] = np.arange(first, last + 1) * width
    return edges


def _bars(heights: NDArray[np.float64], tone: str, number: int, series: int) -> Iterator[str]:
    """Yield a bar for each bin; heights (B,) are shares of the highest."""
    bin_width = (_WIDTH - _LEFT) / len(heights)
    width = bin_width * 0.9 / series
    for index, height in enumerate(heights.tolist()):
        if height:
            x, y = _LEFT + index * bin_width + number * width, _BOTTOM - height * (_BOTTOM - 10)
            yield (
                f'<rect class={tone} x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{_BOTTOM - y:.1f}"/>'
            )


def _tick(edges: NDArray[np.int64], index: int) -> str:
    x = _LEFT + index * (_WIDTH - _LEFT) / (len(edges) - 1)
    anchor = "end" if index == len(edges) - 1 else "middle"
    return f'<text x="{x:.1f}" y="{_BOTTOM + 16}" text-anchor="{anchor}">{edges[index]:,}</text>'


def _finding_sections(report: DoctorReport) -> Iterator[str]:
    for check in report.policies:
        findings = [finding for finding in report.findings if finding.check == check]
        if findings:
            left = len(findings) - _SHOWN
            more = f"<p class=soft>and {left:,} more</p>" if left > 0 else ""
            table = _table(
                "<th class=n>row<th>place<th>detail", "".join(map(_finding, findings[:_SHOWN]))
            )
            yield _section(f"{check}: {CHECKS[check].summary}", table + more)


def _finding(finding: Finding) -> str:
    return (
        f"<tr><td class=n>{finding.row}</td><td><code>{escape(finding.place)}</code></td>"
        f"<td>{escape(finding.detail)}</td></tr>"
    )


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#59636e;--rule:#d1d9e0;
--a:#0b62c4;--b:#b45309;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--page:#0f1318;--ink:#e6edf3;--soft:#9aa6b2;--rule:#2f3742;
--a:#6cb0ff;--b:#f2a65a;--bad:#ff8a7a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:60rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem;overflow-wrap:anywhere}
.soft,.none td{color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:.25rem 1rem .25rem 0;text-align:left;vertical-align:top;font-weight:400}
thead th{color:var(--soft);font-size:.875rem;border-bottom:1px solid var(--rule)}
.n{text-align:right;font-variant-numeric:tabular-nums}
.error .n{color:var(--bad);font-weight:600}.warn .n,.drop .n{color:var(--b);font-weight:600}
.legend i{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 .8rem}
i.a{background:var(--a)}i.b{background:var(--b)}
figure{margin:.5rem 0}
svg{display:block;width:100%;height:auto}
rect.a{fill:var(--a)}rect.b{fill:var(--b)}
text{fill:var(--soft);font-size:12px}
code{font-size:.85rem;overflow-wrap:anywhere}
"""
