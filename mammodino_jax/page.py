"""Parts of a self-contained HTML page: pictures carry their own bytes, nothing is loaded from elsewhere."""

import base64
import html

import cv2
import numpy as np

CSS = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #0b5fa5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 24px 0 6px; }
p { margin: 0 0 12px; max-width: 90ch; }
.lead, figcaption, .note { color: var(--soft); }
figcaption, .note { font-size: 0.875rem; }
figcaption { margin-top: 6px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 24px;
  margin-top: 20px; }
.banner { border-left: 5px solid #d9820b; background: #fff8ec; }
.banner p:last-child { margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 12px;
  margin: 14px 0; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.facts dt { color: var(--soft); font-size: 0.8125rem; }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.facts small { display: block; font-weight: 400; font-size: 0.8125rem; color: var(--soft); }
figure { margin: 14px 0 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 14px; overflow-x: auto; }
.tiles figure { margin: 0; width: min-content; }
.tiles img { height: 260px; width: auto; max-width: none; }
.sheet figure { min-width: 132px; }
.sheet img { height: 220px; border-radius: 3px; }
.filter { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 6px 16px;
  background: #fff; padding: 10px 0; border-bottom: 1px solid var(--line); font-size: 0.875rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px; }
.grid > * { min-width: 0; }
.side { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.side figure { flex: 1 1 200px; }
.side figure:first-child { flex-grow: 3; }
img { max-width: 100%; height: auto; display: block; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:not(:last-child), td:not(:last-child), td:not(.long) { white-space: nowrap; }
td.long { min-width: 24ch; }
tr.ours td { background: #eaf3fb; }
.figures :is(th, td) { padding: 5px 7px; }
.figures :is(th, td:first-child) { white-space: normal; }
.figures th { vertical-align: bottom; }
.figures td:first-child { min-width: 17ch; }
.figures td.long:last-child { min-width: 20ch; }
.wide + p, .tiles + .tiles, details { margin-top: 14px; }
summary { cursor: pointer; color: var(--accent); font-size: 0.875rem; font-weight: 600; }
code { font: 0.875em ui-monospace, Menlo, Consolas, monospace; background: #f0f3f6; padding: 1px 5px;
  border-radius: 4px; overflow-wrap: anywhere; }
"""


def embed(data: bytes, kind: str, alt: str) -> str:
    """An <img> that carries its own bytes."""
    text = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{text}" alt="{html.escape(alt)}">'


def jpeg(image: np.ndarray, alt: str, quality: int = 88) -> str:
    return embed(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes(), "jpeg", alt)


def table(head: list[str], rows: list[list[str]], marked=frozenset()) -> str:
    """An HTML table; the rows numbered in `marked` stand out."""
    cell = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = ""
    for number, row in enumerate(rows):
        style = ' class="ours"' if number in marked else ""
        body += f"<tr{style}>" + "".join(_cell(str(c)) for c in row) + "</tr>"
    return f'<div class="wide"><table><tr>{cell}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    style = ' class="long"' if len(text) > 40 else ""
    return f"<td{style}>{html.escape(text)}</td>"


def figure(image: str, caption: str = "", **data: str) -> str:
    """A picture with its caption; `data` becomes data-* attributes."""
    marks = "".join(f' data-{name}="{html.escape(value)}"' for name, value in data.items())
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure{marks}>{image}{below}</figure>"


def facts(values: list[tuple[str, str, str]]) -> str:
    """Cards of (what, figure, remark)."""
    card = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>"
    return '<dl class="facts">' + "".join(card.format(*map(html.escape, v)) for v in values) + "</dl>"


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, style: str = "note") -> str:
    return f'<p class="{style}">{html.escape(text)}</p>'


def page(title: str, parts: list[str]) -> str:
    """The whole document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
