"""A page of tables and figures, as Markdown and as self-contained HTML."""

import base64
import dataclasses
import html
import math
import re
from collections.abc import Sequence

from rigl_keras._text import printable

__all__ = [
    "Block",
    "Page",
    "Picture",
    "Section",
    "as_csv_cell",
    "as_html",
    "as_markdown",
]


@dataclasses.dataclass(frozen=True)
class Block:
    """A table.

    Args:
        columns: Headings of the columns.
        lines: The cells of each line; or a string, a heading for the lines
            below it.
        title: Title above the table, `""` for none.
    """

    columns: Sequence[str]
    lines: Sequence[Sequence[str] | str]
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        name: Name of its file, without folder and ending.
        png: The bytes of the image.
        alt: Description for those who cannot see it.
    """

    name: str
    png: bytes
    alt: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page: text, then a figure, then tables, then notes.

    Args:
        anchor: Target for links to it.
        title: Its heading.
        text: Paragraphs.
        picture: A figure, if it has one.
        blocks: Tables.
        notes: The notes behind marks such as [1] in the tables, in order.
        items: Lines of a list.
    """

    anchor: str
    title: str
    text: Sequence[str] = ()
    picture: Picture | None = None
    blocks: Sequence[Block] = ()
    notes: Sequence[str] = ()
    items: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        title: Its heading.
        text: Paragraphs before the first section.
        sections: Its parts.
    """

    title: str
    text: Sequence[str]
    sections: Sequence[Section]


# Markdown.


def as_markdown(page: Page) -> str:
    """Returns a page as Markdown; its figures are files of `figures/`."""
    lines = [f"# {_plain(page.title)}", ""]
    for paragraph in page.text:
        lines += [_plain(paragraph), ""]
    for section in page.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for paragraph in section.text:
            lines += [_plain(paragraph), ""]
        if section.picture is not None:
            alt = _plain(section.picture.alt)
            lines += [f"![{alt}](figures/{section.picture.name}.png)", ""]
        for block in section.blocks:
            lines += _markdown_block(block, len(section.notes))
        for number, note in enumerate(section.notes, start=1):
            lines += [f"[{number}] {_plain(note)}", ""]
        if section.items:
            lines += [f"- {_plain(item)}" for item in section.items] + [""]
    return "\n".join(lines)


def _markdown_block(block, notes):
    def cell(text):
        words, mark = _marked(text, notes)
        return _inline(words).replace("|", "\\|") + mark

    def row(cells):
        return f"| {' | '.join(cells)} |"

    lines = []
    if block.title:
        lines += [f"**{_inline(block.title)}**", ""]
    lines.append(row(map(cell, block.columns)))
    rules = [":--", *["--:"] * (len(block.columns) - 1)]
    lines.append(row(rules))
    for line in block.lines:
        if isinstance(line, str):
            empty = [""] * (len(block.columns) - 1)
            lines.append(row([f"*{cell(line)}*", *empty]))
        else:
            lines.append(row(map(cell, line)))
    return [*lines, ""]


def _marked(cell, notes):
    """Returns a cell and the mark at its end, or ""."""
    found = re.fullmatch(r"(.*)( \[(\d{1,4})\])", cell, re.DOTALL)
    if found is None or not 1 <= int(found[3]) <= notes:
        return cell, ""
    return found[1], found[2]


def _plain(text):
    """Returns a paragraph or item, escaped for Markdown."""
    # At the start, these make a heading, a quote, a list or a rule.
    return re.sub(r"^(\d*)([#>+=.)-])", r"\1\\\2", _inline(text))


def _inline(text):
    """Returns text within a line, escaped for Markdown."""
    text = printable(" ".join(text.split()))
    letters = r"\\`*_<&~$\[\]"
    if re.search(r"[\[\]]", text):
        # Links are broken, so the other characters need no escapes.
        letters += "()!"
    text = re.sub(f"[{letters}]", r"\\\g<0>", text)
    # Many readers turn plain addresses into links.
    return text.replace("://", ":\\//").replace("www.", "www\\.")


# CSV.


def as_csv_cell(text: str) -> str:
    """Returns a cell that spreadsheets do not read as a formula.

    Args:
        text: Text of the cell. Numbers stay numbers, with any sign.

    Returns:
        The text, after an apostrophe if it begins like a formula.
    """
    text = printable(" ".join(text.split()))
    try:
        number = math.isfinite(float(text))
    except ValueError:
        number = False
    return f"'{text}" if text[:1] in _FORMULA and not number else text


# Some languages read full-width characters like these.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
# HTML.

_STYLE = """
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
nav { background: #f6f6f6; padding: .5rem 1rem; }
nav ul { columns: 2; margin: 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 1.2rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid #555; vertical-align: bottom;
  white-space: normal; }
tbody td, tbody th { border-bottom: 1px solid #e4e4e4; }
th:first-child { text-align: left; }
tbody th { font-weight: normal; }
tr.group th { font-style: italic; color: #555; padding-top: .6rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
ol.notes, ul.items { font-size: .85rem; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; }
  nav { display: none; }
  .wide { overflow: visible; }
  img { max-height: 18cm; }
  figure, tr, h2, caption { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: .1rem .4rem; }
}
"""


def as_html(page: Page) -> str:
    """Returns a page as HTML, with its figures and style."""
    links = "\n".join(
        f'<li><a href="#{section.anchor}">{_text(section.title)}</a></li>'
        for section in page.sections
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(page.title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{_text(page.title)}</h1>",
        *(f"<p>{_text(paragraph)}</p>" for paragraph in page.text),
        f'<nav aria-label="Contents">\n<ul>\n{links}\n</ul>\n</nav>',
    ]
    for section in page.sections:
        parts += _html_section(section)
    return "\n".join([*parts, "</body>", "</html>", ""])


def _html_section(section):
    parts = [
        f'<section id="{section.anchor}">',
        f"<h2>{_text(section.title)}</h2>",
        *(f"<p>{_text(paragraph)}</p>" for paragraph in section.text),
    ]
    if section.picture is not None:
        image = base64.b64encode(section.picture.png).decode()
        alt = html.escape(printable(section.picture.alt))
        parts.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{image}">'
            "</figure>"
        )
    for block in section.blocks:
        parts += _html_block(block, len(section.notes))
    if section.notes:
        items = "".join(f"<li>{_text(note)}</li>" for note in section.notes)
        parts.append(f'<ol class="notes">{items}</ol>')
    if section.items:
        items = "".join(f"<li>{_text(item)}</li>" for item in section.items)
        parts.append(f'<ul class="items">{items}</ul>')
    return [*parts, "</section>"]


def _html_block(block, notes):
    def cell(text):
        words, mark = _marked(text, notes)
        return _text(words) + (mark and f"<sup>{mark.strip()}</sup>")

    parts = ['<div class="wide">', "<table>"]
    if block.title:
        parts.append(f"<caption>{_text(block.title)}</caption>")
    heads = "".join(
        f'<th scope="col">{_text(column)}</th>' for column in block.columns
    )
    parts.append(f"<thead><tr>{heads}</tr></thead>")
    parts.append("<tbody>")
    for line in block.lines:
        if isinstance(line, str):
            parts.append(
                f'<tr class="group"><th colspan="{len(block.columns)}" '
                f'scope="rowgroup">{_text(line)}</th></tr>'
            )
            continue
        first, *others = line
        cells = "".join(f"<td>{cell(other)}</td>" for other in others)
        parts.append(f'<tr><th scope="row">{cell(first)}</th>{cells}</tr>')
    return [*parts, "</tbody>", "</table>", "</div>"]


def _text(text):
    """Returns text, escaped for HTML."""
    return html.escape(printable(" ".join(text.split())), quote=False)
