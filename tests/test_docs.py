"""The documentation as a whole: its examples run, its tables say what the code says, its links lead somewhere."""

import ast
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union

import pytest
import typer
from test_package import FLOORS, PACKAGE, ROOT

import stabilitykit.records
from stabilitykit.cli import app

DOCS = ROOT / "docs"
REPORTS = ROOT / "reports"
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")]
    + [*DOCS.rglob("*.md"), REPORTS / "README.md"]
)
COMMANDS: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """The page's fenced blocks: what stands behind the fence, and what is in it."""
    return blocks_of(page.read_text())


def blocks_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^ *```([^\n`]*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def tables(text: str) -> Iterator[list[list[str]]]:
    """The rows of each table in `text`, the heading first, cells without spaces around them."""
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table.splitlines()]
        yield [[cell.strip() for cell in row] for row in rows if set("".join(row)) - set("-: ")]


def shown(command: str) -> list[str]:
    """The arguments of a line of a console block, `stabilitykit` left out."""
    words = shlex.split(command)
    assert words[0] == "stabilitykit", command
    return words[1:]


def typed(body: str) -> list[str]:
    """What is typed after the prompts of a console block, commands of others left out."""
    return [line[2:] for line in body.splitlines() if line.startswith("$ stabilitykit ")]


# README and commands


def test_the_readme_fits_on_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_and_is_in_the_readme(command: str) -> None:
    assert f"[`stabilitykit {command}`](docs/commands/{command}.md)" in (ROOT / "README.md").read_text()
    assert (DOCS / "commands" / f"{command}.md").read_text().startswith(f"# stabilitykit {command}\n")


def test_no_page_is_about_a_command_that_is_not_there() -> None:
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == set(COMMANDS)


def told_default(parameter: Any) -> str | None:
    """What an option's table says of its default; None where words may say it, because the code has none to show."""
    default = parameter.default
    if parameter.required:
        return "required"
    if default is False:
        return "off"
    return None if default is None else f"`{getattr(default, 'value', default)}`"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_of_options_names_every_option_and_its_default(command: str) -> None:
    text = (DOCS / "commands" / f"{command}.md").read_text()
    heading, *rows = next(table for table in tables(text) if table[0][:1] == ["option"])
    assert heading == ["option", "what it does", "default", "unit"]
    documented = {name.strip("`"): default for name, _, default, _ in rows}
    real = {
        parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper(): parameter
        for parameter in COMMANDS[command].params
        if parameter.name != "help"
    }
    missing, extra = sorted(set(real) - set(documented)), sorted(set(documented) - set(real))
    assert (missing, extra) == ([], []), f"docs/commands/{command}.md: missing {missing}, not an option {extra}"
    for name, parameter in real.items():
        told = told_default(parameter)
        assert documented[name] == told or (told is None and documented[name]), f"{name}: {told}"
    for what in (cell for row in rows for cell in row[1:2]):
        assert len(what) > len("the text"), what


# Examples


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_shown_could_be_run(page: Path) -> None:
    for info, body in blocks(page):
        for command in typed(body) if info.startswith("console") else ():
            name, *arguments = shown(command)
            COMMANDS[name].make_context(name, arguments)  # raises for what it does not know


def test_commands_that_could_not_be_run_are_found_out() -> None:
    for name, *arguments in (["profile", "x", "--prompt", "y", "--colour", "red"], ["bound", "x", "--dtype", "int8"]):
        with pytest.raises(Exception, match=r"--colour|int8"):
            COMMANDS[name].make_context(name, arguments)


def normal(text: str) -> str:
    """Without what differs between processors and widths: digits are alike, and so is any white space."""
    return " ".join(re.sub(r"-?\d[\d,.]*(e[+-]?\d+)?", "#", text).split())


def is_shown_by(excerpt: str, output: str) -> str | None:
    """The first part of `excerpt`, between its lines of three dots, that does not follow in `output`; None for none."""
    rest = normal(output)
    for part in re.split(r"^ *\.\.\. *$", excerpt, flags=re.MULTILINE):
        if wanted := normal(part):  # what ends with three dots has nothing after them
            _, found, rest = rest.partition(wanted)
            if not found:
                return part
    return None


def test_an_excerpt_has_to_be_in_the_output_and_in_its_order() -> None:
    output = "one 1.5\ntwo\nthree -3e-4\n"
    assert is_shown_by("one 2.75\n...\nthree 4", output) is None
    assert is_shown_by("three 4\n...\none 2.75", output) == "\none 2.75"
    assert is_shown_by("one\n...\nfour", output) == "\nfour"


def run(command: str, folder: Path) -> str:
    """What a command of the kit prints, in a process of its own, 100 columns wide."""
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "stabilitykit", *shown(command)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN = [page for page in PAGES if any(info.endswith(" run") for info, _ in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_examples_print_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for info, body in blocks(page):
        language, _, name = info.partition(" ")
        if language == "toml" and name:
            (tmp_path / name).write_text(body)
        elif info == "console run":
            output = "".join(f"$ {command}\n{run(command, tmp_path)}\n" for command in typed(body))
            missing = is_shown_by(body, output)
            assert missing is None, f"{name_of(page)} shows\n{missing}\nand what is printed is\n{output}"
        elif info == "python run":
            exec(compile(body, name_of(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_and_json_that_is_shown_can_be_read(page: Path) -> None:
    for info, body in blocks(page):
        if info.startswith("python"):
            compile(body, name_of(page), "exec")
        elif info.startswith("json"):
            json.loads(body)


# Links


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings, and those that a page sets itself."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]*)">', page.read_text()))


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](#one-heading) [b](#two) [c](page.md) [d](none.md) ![e](none.png)\n")
    assert dead_links(page) == ["#two", "none.md", "none.png"]


# Records


def spelled(hint: Any) -> str:
    """A type as docs/records.md writes it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return f"{spelled(next(argument for argument in arguments if argument is not NoneType))} or None"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple and Ellipsis in arguments:
        return f"list of {spelled(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(map(spelled, arguments))})"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"map from {spelled(arguments[0])} to {spelled(arguments[1])}"
    return "any" if hint is Any else str(hint.__name__)


def inside(hint: Any) -> Iterator[type]:
    """The dataclasses in a type."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for argument in typing.get_args(hint):
        yield from inside(argument)


def written() -> dict[str, type]:
    """Every dataclass of `records/` that is written to a file: those with a schema, and all that they are made of."""
    modules = [
        importlib.import_module(f"stabilitykit.records.{module.name}")
        for module in pkgutil.iter_modules(stabilitykit.records.__path__)
    ]
    values = (value for module in modules for value in vars(module).values())
    known = {kind for kind in values if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    named = {"Record", "Span", "Check", "Peak", "Failure", "Footprint", "Memory", "Shortage"}
    ahead = [
        kind
        for kind in known
        if isinstance(kind, type)
        and (kind.__name__ in named or any(field.name == "schema" for field in dataclasses.fields(kind)))
    ]
    found: dict[str, type] = {}
    while ahead:
        kind = ahead.pop()
        if kind.__name__ not in found:
            found[kind.__name__] = kind
            ahead += [base for base in kind.__bases__ if base in known]
            ahead += [part for hint in typing.get_type_hints(kind).values() for part in inside(hint)]
    return found


@pytest.mark.parametrize("name", sorted(written()))
def test_every_field_that_is_written_is_documented(name: str) -> None:
    text = (DOCS / "records.md").read_text()
    _, found, section = text.partition(f"\n### {name}\n")
    assert found, f"docs/records.md has no section {name}"
    heading, *rows = next(tables(section))
    assert heading == ["field", "type", "unit", "meaning"]
    kind = written()[name]
    hints = typing.get_type_hints(kind)
    own = [field.name for field in dataclasses.fields(kind) if field.name in kind.__annotations__]
    documented = {field.strip("`"): (type_, meaning) for field, type_, _, meaning in rows}
    assert list(documented) == own
    for field, (type_, meaning) in documented.items():
        assert type_ == spelled(hints[field]), field
        assert meaning, field


# The package's listing


def described(path: Path) -> str:
    documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
    return documentation.partition("\n")[0]


def listing() -> str:
    """The package as docs/ARCHITECTURE.md shows it: a floor above what it may import, one line a file."""
    lines = [("stabilitykit/", described(PACKAGE / "__init__.py"))]

    def folder(path: Path, depth: int) -> None:
        lines.append((f"{'  ' * depth}{path.name}/", described(path / "__init__.py")))
        files(path, depth + 1)
        for inner in sorted(part for part in path.iterdir() if (part / "__init__.py").exists()):
            folder(inner, depth + 1)

    def files(path: Path, depth: int) -> None:
        for file in sorted(path.glob("*.py")):
            if file.name != "__init__.py":
                lines.append((f"{'  ' * depth}{file.name}", described(file)))

    for floor in reversed(FLOORS):
        for part in sorted(floor - {"ground"}):
            folder(PACKAGE / part, 1)
    files(PACKAGE, 1)
    width = max(len(name) for name, _ in lines) + 2
    return "".join(f"{name:{width}}{what}\n" for name, what in lines)


def test_the_listing_in_the_architecture_is_the_tree() -> None:
    shown = next(body for _, body in blocks(DOCS / "ARCHITECTURE.md") if body.startswith("stabilitykit/"))
    real, told = listing().splitlines(), shown.splitlines()
    missing, extra = [line for line in real if line not in told], [line for line in told if line not in real]
    assert (missing, extra) == ([], []), "\n".join(["missing:", *missing, "not there:", *extra])
    assert real == told, "the lines are right, their order is not"


def test_the_floors_are_drawn_as_they_are() -> None:
    drawn = next(body for _, body in blocks(DOCS / "ARCHITECTURE.md") if body.startswith("cli "))
    ground = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    real = [floor if floor != {"ground"} else ground for floor in reversed(FLOORS)]
    assert [set(line.partition("  ")[0].split()) for line in drawn.splitlines()] == real


def test_the_listing_leaves_no_file_out() -> None:
    named = len([line for line in listing().splitlines() if line.split()[0].endswith(".py")])
    folders = len([line for line in listing().splitlines() if line.split()[0].endswith("/")])
    assert named + folders == len(list(PACKAGE.rglob("*.py")))


# Reports

REPORTED = sorted(path.parent.name for path in REPORTS.glob("*/report.md") if path.parent.name != "demo")
KEPT = sorted(path.parent.name for path in REPORTS.glob("*/experiment.json") if path.parent.name != "demo")


@pytest.mark.parametrize("name", REPORTED)
def test_every_report_is_in_the_index_with_its_figure(name: str) -> None:
    index = (REPORTS / "README.md").read_text()
    row = next((line for line in index.splitlines() if f"]({name}/report.md)" in line), None)
    assert row is not None, name
    figure = re.search(rf"\(({name}/figures/[^)]*\.(?:png|svg))\)", row)
    assert figure is not None, row
    assert (REPORTS / figure[1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_every_report_that_keeps_its_plan_can_be_drawn_again(name: str, tmp_path: Path) -> None:
    shutil.copytree(REPORTS / name, tmp_path / name)
    for drawn in ("report.md", "report.html"):
        (tmp_path / name / drawn).unlink()
    where_sweeps_are_started = ROOT
    assert "Report:" in run(f"stabilitykit report {shlex.quote(str(tmp_path / name))}", where_sweeps_are_started)
    title = json.loads((REPORTS / name / "experiment.json").read_text())["title"]
    assert (tmp_path / name / "report.md").read_text().startswith(f"# {title}\n")


def test_the_sweeps_and_findings_of_the_repository_keep_theirs() -> None:
    assert {"bounds", "claims", "float16_break", "remedies", "search"} <= set(KEPT)
