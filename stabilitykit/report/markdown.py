"""A report as one Markdown file, in GitHub's flavour, beside the figures and tables it links to."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from stabilitykit.report.blocks import Block, Explorer, Figure, Prose, Section, Table
from stabilitykit.report.prose import spans
from stabilitykit.report.tables import SHORT, cell_text, heading, numeric_columns


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as text. Tables longer than SHORT rows are cut, and say so with a link to the whole."""
    parts = [f"# {_plain(title)}"]
    if sections:
        parts.append("\n".join(f"- [{_plain(section.title)}](#{section.key})" for section in sections))
    else:
        parts.append("This report has no sections.")
    for section in sections:
        # An anchor of its own: what a renderer makes of a heading differs from one to the next.
        parts += [f'<a id="{section.key}"></a>', f"## {_plain(section.title)}", _prose(section.opening)]
        parts += [part for block in section.blocks for part in _block(block)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Prose(text):
            yield _prose(text)
        case Table():
            yield f"**{_plain(block.title)}**"
            yield _table(block)
            link = f"[{block.name}.csv](tables/{block.name}.csv)"
            cut = (
                f"The first {SHORT} of {len(block.rows):,} rows; all are in {link}."
                if len(block.rows) > SHORT
                else link
            )
            yield f"{_prose(block.note)} {cut}" if block.note else cut
        case Explorer():
            yield f"The explorer is in [report.html](report.html): {_plain(block.title)}."
        case Figure():
            yield f"![{_plain(block.alt)}](figures/{block.name}.png)"
            yield f"**{_plain(block.title)}** {_prose(block.caption)} [{block.name}.svg](figures/{block.name}.svg)"


def _table(table: Table) -> str:
    rule = ["--:" if numeric else ":--" for numeric in numeric_columns(table)]
    lines = [[_plain(heading(column)) for column in table.columns], rule]
    for row in table.rows[:SHORT]:
        lines.append([_plain(cell_text(cell, column)) for cell, column in zip(row, table.columns, strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(text: str) -> str:
    parts = []
    for bold, run in groupby(spans(text), key=lambda span: span.bold):
        inner = "".join(f"`{span.text}`" if span.code else _plain(span.text, flat=False) for span in run)
        parts.append(f"**{inner}**" if bold else inner)
    return "".join(parts)


def _plain(text: str, *, flat: bool = True) -> str:
    """Text that no renderer takes for markup or HTML: `<bos>` must not vanish. `flat`: on one line."""
    text = re.sub(r"\s*\n\s*", " ", text) if flat else text
    text = re.sub(r"([\\`*\[\]<>|~$])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)  # between letters an underscore is only an underscore
    text = re.sub(r"(?m)^(\s*)(#|[-+]\s)", r"\1\\\2", text)
    return re.sub(r"(?m)^(\s*\d+)([.)]\s)", r"\1\\\2", text)
