"""The HTML of a page: its frame, its style sheet, tables, figures and how numbers are written."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

NOTHING = "\N{EN DASH}"
COLORS = 8  # classes c0, c1, ... of the style sheet
ERROR = "_se"  # behind the name of a metric: its standard error
INTERVAL = 1.96  # standard errors to either side: 95 % of a normal distribution


def write_page(title: str, body: Iterable[str]) -> str:
    """Return a whole page."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain texts, the first of each row its name."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(
        f"<tr><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def figure(title: str, svg: str, legend: Iterable[str] = ()) -> str:
    """Return a chart under its title and its legend, of ``key`` each."""
    keys = " ".join(legend)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> "
        f'<span class="legend">{keys}</span></figcaption>{svg}</figure>'
    )


def key(label: str, color: int, mark: str = "solid") -> str:
    """Return an entry of a legend; ``mark`` is solid, dashed or block."""
    return f'<span class="c{color % COLORS}"><i class="{mark}"></i>{escape(label)}</span>'


def charts(figures: Sequence[str]) -> Iterator[str]:
    """Yield figures side by side, where there is room."""
    if figures:
        yield '<div class="charts">'
        yield from figures
        yield "</div>"


def section(title: str, body: Sequence[str], note: str = "") -> Iterator[str]:
    """Yield a part of the page with its title, if there is anything in it."""
    if body:
        yield f"<h2>{escape(title)}</h2>"
        yield from [f"<p>{escape(note)}</p>"] if note else []
        yield from body


def shown(value: float | None) -> str:
    """Write a number shortly."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def estimate(ends: Mapping[str, float], name: str) -> str:
    """Write a metric with its 95 % interval, if a standard error is known that can be seen."""
    return f"{shown(ends.get(name))} {interval(ends, name)}".rstrip()


def interval(ends: Mapping[str, float], name: str) -> str:
    """Write the 95 % interval of a metric; nothing if no standard error is known that can be seen.

    Args:
        ends: values by name, the standard error of ``name`` under ``name_se``.
        name: of the metric.
    """
    value, error = ends.get(name), ends.get(f"{name}{ERROR}")
    if value is None or not error or not math.isfinite(error):
        return ""
    low, high = value - INTERVAL * error, value + INTERVAL * error
    if name.endswith("accuracy"):  # a share of pairs
        low, high = max(low, 0.0), min(high, 1.0)
    return "" if shown(low) == shown(high) else f"[{low:.3g}, {high:.3g}]"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2330; --faint: #5b6472; --line: #d9dde3;
  --c0: #0067a5; --c1: #c24e00; --c2: #1a7f4b; --c3: #8a3ffc; --c4: #b3007d; --c5: #7a6200;
  --c6: #00748f; --c7: #5b6472; }
@media (prefers-color-scheme: dark) { :root { --back: #14181f; --text: #e4e8ee; --faint: #9aa4b2;
  --line: #333b47; --c0: #62b5ec; --c1: #f0a050; --c2: #5fd08f; --c3: #bf9bff; --c4: #ff7fd0;
  --c5: #d9bf4a; --c6: #4fd1e8; --c7: #9aa4b2; } }
@media print { :root { --back: #fff; --text: #000; --faint: #444; --line: #bbb;
  --c0: #0067a5; --c1: #c24e00; --c2: #1a7f4b; --c3: #8a3ffc; --c4: #b3007d; --c5: #7a6200;
  --c6: #00748f; --c7: #5b6472; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; break-after: avoid; }
p { margin: .25rem 0 1rem; color: var(--faint); max-width: 60rem; overflow-wrap: anywhere; }
ul { margin: .25rem 0 1rem; padding-left: 1.2rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem; margin-top: 1rem; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; color: var(--faint);
  overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 1.5em; margin-right: .4em; vertical-align: middle;
  border-top: 2px solid; }
.legend i.dashed { border-top-style: dashed; }
.legend i.block { width: .8em; border-top-width: .8em; opacity: .6; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.legend i { border-color: var(--c); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
svg .label { fill: var(--c); }
svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
svg .raw { stroke-width: 1; opacity: .35; }
svg .dashed { stroke-dasharray: 6 4; }
svg .whisker { stroke-width: 1.2; opacity: .6; }
svg .dot { fill: var(--c); }
svg .band { fill: var(--c); opacity: .15; }
svg .bar { fill: var(--c); opacity: .25; }
svg .outline { stroke-width: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; }
td, tr > th:first-child { white-space: nowrap; }
th { font-weight: 600; } tr > th:first-child { text-align: left; font-weight: 400; }
.samples { display: grid; gap: 1.25rem; }
.sample { border-left: 3px solid var(--line); padding-left: .8rem; break-inside: avoid; }
.sample dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem .8rem; margin: 0; }
.sample dt { color: var(--faint); }
.sample dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
@media (max-width: 30rem) { svg text { font-size: 13.5px; } th, td { font-size: 13px; }
  td, tr > th:first-child { white-space: normal; }
  .sample dl { grid-template-columns: 1fr; } .sample dd { margin-bottom: .4rem; } }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 4px;
  font-size: 13px; }
@media print { body { max-width: none; } pre { white-space: pre-wrap; }
  .charts { grid-template-columns: 1fr 1fr; } }
"""
