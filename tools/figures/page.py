"""The page around the figures: one HTML file that needs nothing else, on a laptop and on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 0 auto;
       max-width: 1240px; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; border-top: 1px solid #d8dee5; padding-top: 1.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0; }
.tile { flex: 1 1 140px; border: 1px solid #d8dee5; border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.tile span, .note { color: #5b6875; font-size: .87rem; }
.verdict { border-left: 4px solid #0072b2; background: #f3f7fb; padding: .5rem .8rem; margin: .5rem 0;
           font-size: .95rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .22rem .6rem; border-bottom: 1px solid #e5e9ee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.ours td { font-weight: 600; background: #f3f7fb; }
.figures { columns: 2 460px; column-gap: 2rem; }
figure { margin: 0 0 1.4rem; break-inside: avoid; }
figcaption { color: #5b6875; font-size: .87rem; margin-bottom: .3rem; }
img { max-width: 100%; height: auto; display: block; }
code { overflow-wrap: anywhere; } details { margin-top: .5rem; } summary { cursor: pointer; color: #0072b2; }
"""


def page(name: str, parts: Sequence[str]) -> str:
    """Return the whole page."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def title(words: str) -> str:
    """The page's title, on the page."""
    return f"<h1>{html.escape(words)}</h1>"


def heading(words: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(words)}</h2>"


def note(words: str) -> str:
    """A line in small print."""
    return f"<p class=note>{html.escape(words)}</p>"


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Big numbers with what they are."""
    boxes = (
        f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(w)}</span></div>' for v, w in values
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def verdicts(lines: Sequence[str]) -> str:
    """The verdict of each model."""
    return "".join(f'<div class="verdict">{html.escape(line)}</div>' for line in lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], ours: Sequence[bool] = ()) -> str:
    """A table that scrolls by itself where it is too wide; rows marked `ours` stand out."""
    first = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = ""
    for i, row in enumerate(rows):
        mark = " class=ours" if i < len(ours) and ours[i] else ""
        body += f"<tr{mark}>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>"
    return f'<div class="scroll"><table><tr>{first}</tr>{body}</table></div>'


def picture(data: bytes, words: str) -> str:
    """A figure with its caption; the picture is part of the page."""
    kind = "png" if data[:4] == b"\x89PNG" else "jpeg"
    text = html.escape(words)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="{source}"></figure>'


def figures(pictures: Sequence[str]) -> str:
    """Figures beside each other where there is room."""
    return f'<div class="figures">{"".join(pictures)}</div>'


def folded(words: str, content: str) -> str:
    """Something to open with a click."""
    return f"<details><summary>{html.escape(words)}</summary>{content}</details>"
