from stabilitykit.report.blocks import Prose, Section, Table
from stabilitykit.report.markdown import markdown
from stabilitykit.report.prose import Span, spans


def test_an_empty_report_says_so() -> None:
    assert markdown("Nothing", []) == "# Nothing\n\nThis report has no sections.\n"


def test_every_kind_of_block_is_written(sections: list[Section]) -> None:
    assert (
        markdown("float16 & <bos>", sections)
        == r"""# float16 & \<bos\>

- [Verdict](#verdict)
- [Length × dtype](#lengths)
- [Headroom](#heat)
- [Softmax](#softmax)

<a id="verdict"></a>

## Verdict

What was found.

**float16** breaks at `<bos>`.

<a id="lengths"></a>

## Length × dtype

A length is no cause.

**Lengths**

| text | length \[tokens\] | headroom \[bits\] | clean |
| :-- | --: | --: | :-- |
| a\|b | 1,000 | 0.25 | yes |
| \<bos\> | 12 | – | no |
| – | 7 | -3.0 | – |
| \*two\* lines | 12 | NaN | yes |
| \_x\_ float8_e4m3fn | 300 | inf | yes |

See `layers.7/add.1`. [mixed.csv](tables/mixed.csv)

![rising "lines"](figures/peaks.png)

**Peaks** Of `<bos>`. [peaks.svg](figures/peaks.svg)

<a id="heat"></a>

## Headroom

Bits.

![a heat map](figures/map.png)

**Layer × site** Dark is near. [map.svg](figures/map.svg)

<a id="softmax"></a>

## Softmax

Nothing was recorded.
"""
    )


def test_a_long_table_ends_with_a_link_to_the_rest(long_table: Table) -> None:
    text = markdown("Long", [Section(key="s", title="S", opening="O.", blocks=[long_table])])
    assert "| 40 | 80 |\n\nThe first 40 of 60 rows; all are in [long.csv](tables/long.csv)." in text
    assert "| 41 | 82 |" not in text


def test_text_that_looks_like_markup_stays_text() -> None:
    text = markdown("T", [Section(key="s", title="S", opening="# 5 $x$ ~y~", blocks=[Prose("1. one"), Prose("- two")])])
    assert text.endswith("\\# 5 \\$x\\$ \\~y\\~\n\n1\\. one\n\n\\- two\n")


def test_code_in_bold_is_one_run() -> None:
    text = markdown("T", [Section(key="s", title="S", opening="**`inf` · 0** is `a**b`")])
    assert text.endswith("\n\n**`inf` · 0** is `a**b`\n")


def test_spans_leave_an_open_pair_alone() -> None:
    assert list(spans("")) == []
    assert list(spans("**a** 2**3")) == [Span("a", bold=True), Span(" 2"), Span("**"), Span("3")]
