from rich.console import Console

from stabilitykit.report.blocks import Section, Table
from stabilitykit.report.terminal import print_section


def printed(section: Section) -> str:
    console = Console(width=70, highlight=False, color_system=None)
    with console.capture() as capture:
        print_section(section, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def test_a_section_without_blocks_is_its_opening() -> None:
    assert printed(Section(key="s", title="Softmax", opening="Nothing was recorded.")) == (
        "Softmax\nNothing was recorded.\n"
    )


def test_prose_tables_and_figures_are_printed(sections: list[Section]) -> None:
    assert "float16 breaks at <bos>." in printed(sections[0])
    assert printed(sections[1]) == (
        "Length × dtype\n"
        "A length is no cause.\n"
        "\n"
        "Lengths\n"
        "text               length [tokens]  headroom [bits]  clean\n"
        "a|b                          1,000             0.25  yes\n"
        "<bos>                           12                –  no\n"
        "–                                7             -3.0  –\n"
        "*two*                           12              NaN  yes\n"
        "lines\n"
        "_x_ float8_e4m3fn              300              inf  yes\n"
        "See layers.7/add.1.\n"
        "\n"
        "Peaks: figures/peaks.svg\n"
    )


def test_a_long_table_is_cut_and_says_where_the_rest_is(long_table: Table) -> None:
    text = printed(Section(key="s", title="S", opening="O.", blocks=[long_table]))
    assert "The first 40 of 60 rows; all are in tables/long.csv." in text
    assert "\n40  80\n" in text
    assert "\n41  82" not in text
