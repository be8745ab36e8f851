"""A page of tables and figures, as Markdown and as self-contained HTML."""

import base64
import dataclasses
import html
import math
import re
from collections.abc import Sequence

from rigl_keras._text import printable
from rigl_keras.experiments.report.page_style import STYLE

__all__ = [
    "Block",
    "Link",
    "Page",
    "Picture",
    "Section",
    "as_csv_cell",
    "as_html",
    "as_markdown",
]


class Link(str):
    """A cell that leads to a file.

    Args:
        words: What it says.
        target: Where the file is, seen from the page, in the letters of URLs.
    """

    target: str

    def __new__(cls, words: str, target: str):
        link = super().__new__(cls, words)
        link.target = target
        return link


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
        commands: Lines of a shell that make it again.
        folded: Whether its tables open at a click, as long ones do.
    """

    anchor: str
    title: str
    text: Sequence[str] = ()
    picture: Picture | None = None
    blocks: Sequence[Block] = ()
    notes: Sequence[str] = ()
    items: Sequence[str] = ()
    commands: Sequence[str] = ()
    folded: bool = False


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
        if section.commands:
            commands = [_line(c).replace("`", "'") for c in section.commands]
            lines += ["```sh", *commands, "```", ""]
    return "\n".join(lines)


def _markdown_block(block, notes):
    def cell(text):
        words, mark = _marked(text, notes)
        said = _inline(words).replace("|", "\\|") + mark
        if isinstance(text, Link):
            return f"[{said}]({text.target})"
        return said

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


def _line(text):
    return printable(" ".join(text.split()))


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
        f"<style>{STYLE}</style>",
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
        # A box that is ticked is an image in its own size, without a script.
        parts.append(
            '<figure><label class="larger">'
            '<input type="checkbox" aria-label="Larger">'
            f'<img alt="{alt}" src="data:image/png;base64,{image}">'
            "</label><figcaption>A click or a tap shows the figure in its own "
            "size, and again as wide as the page.</figcaption></figure>"
        )
    tables = [
        line
        for block in section.blocks
        for line in _html_block(block, len(section.notes))
    ]
    if tables and section.folded:
        tables = ["<details>", "<summary>Show</summary>", *tables, "</details>"]
    parts += tables
    if section.notes:
        items = "".join(f"<li>{_text(note)}</li>" for note in section.notes)
        parts.append(f'<ol class="notes">{items}</ol>')
    if section.items:
        items = "".join(f"<li>{_text(item)}</li>" for item in section.items)
        parts.append(f'<ul class="items">{items}</ul>')
    if section.commands:
        lines = "\n".join(html.escape(_line(c)) for c in section.commands)
        parts.append(f"<pre>{lines}</pre>")
    return [*parts, "</section>"]


def _html_block(block, notes):
    def cell(text):
        words, mark = _marked(text, notes)
        said = _text(words) + (mark and f"<sup>{mark.strip()}</sup>")
        if isinstance(text, Link):
            return f'<a href="{html.escape(text.target)}">{said}</a>'
        return said

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
