"""The package as a whole: what it exports, what it imports when, and that a wheel of it works."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import stabilitykit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stabilitykit"

# Imports go down only: a part may import those in lower rows, and itself. "ground" are the modules at the top.
FLOORS = [
    {"ground"},
    {"checkpoints", "proof", "records"},
    {"diagnosis", "models"},
    {"recorder"},
    {"scaling"},
    {"report", "run"},
    {"bounds", "searches", "sweeps"},
    {"remedies"},
    {"trials"},
    {"gate", "guards"},
    {"cli"},
]


def test_every_public_name_is_there() -> None:
    for module in pkgutil.walk_packages(stabilitykit.__path__, "stabilitykit."):
        if "cuda" not in module.name and not module.name.endswith("__main__"):  # Triton is not everywhere
            importlib.import_module(module.name)  # a submodule of the same name would take a function's place
    for name in stabilitykit.__all__:
        found = getattr(stabilitykit, name)
        assert isinstance(found, Mapping | str) if name in ("FORMATS", "__version__") else callable(found), name
    assert set(stabilitykit.__all__) <= set(dir(stabilitykit))
    with pytest.raises(AttributeError, match="nothing"):
        stabilitykit.nothing  # noqa: B018


def part_of(module: str) -> str:
    """The folder of the package that a module, or a name of the package itself, is in, or "ground"."""
    part = module.split(".")[1]
    part = stabilitykit._HOMES.get(part, part).split(".")[0]
    return "ground" if (PACKAGE / f"{part}.py").exists() else part


def imported(source: str) -> set[str]:
    """The modules of the kit that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith("stabilitykit."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("stabilitykit.")}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_go_down_only() -> None:
    height = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
    upward = []
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.stem in ("__init__", "__main__"):
            continue
        part = part_of(module_name(path))
        for target in map(part_of, imported(path.read_text())):
            if target != part and height[target] >= height[part]:
                upward.append(f"{path.relative_to(ROOT)} imports {target}")
    assert upward == []
    assert imported("from stabilitykit.cli import main") == {"stabilitykit.cli.main"}  # it can fail


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that lead back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(graph[start])
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += graph[module]
        return seen

    return sorted(module for module in graph if module in reached(module))


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        source = ast.parse(path.read_text())
        at_once = [node for node in source.body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[module_name(path)] = imported(ast.unparse(ast.Module(body=[*at_once], type_ignores=[])))
    for module, targets in graph.items():
        named = {target if target in graph else target.rpartition(".")[0] for target in targets}
        graph[module] = {target for target in named if target in graph and target != module}
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b"]  # it can fail


LONGEST_MODULE, LONGEST_FUNCTION = 450, 80  # lines; a function's without its signature and its docstring


def may_be_long(path: Path) -> bool:
    """A compiler wants a kernel in one function, and who reads the proof's check wants it in one file."""
    return "kernels" in path.parts or path.parts[-2:] == ("proof", "check.py")


def long_functions(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > LONGEST_FUNCTION:
                found.append(f"{node.name}: {lines} lines")
    return found


def test_no_module_is_too_long_to_be_about_one_thing() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py") if not may_be_long(path)}
    assert [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > LONGEST_MODULE] == []
    assert len(lengths) > 100
    assert not any(map(may_be_long, (PACKAGE / "recorder" / "record.py", PACKAGE / "bounds" / "check.py")))


def test_no_function_is_too_long_to_be_seen_at_once() -> None:
    long = {path: long_functions(path.read_text()) for path in PACKAGE.rglob("*.py") if not may_be_long(path)}
    assert {str(path.relative_to(ROOT)): names for path, names in long.items() if names} == {}
    told = 'async def f(\n    a,\n):\n    """Two\n    lines."""\n' + "    x = 1\n" * LONGEST_FUNCTION
    assert long_functions(told) == []
    within = "class A:\n" + textwrap.indent(told + "    x = 1\n", "    ")
    assert long_functions(within) == [f"f: {LONGEST_FUNCTION + 1} lines"]  # it can fail


TORCHLESS = (
    "stabilitykit",
    "stabilitykit.cli",
    "stabilitykit.diagnosis",
    "stabilitykit.records",
    "stabilitykit.records.sweep",
    "stabilitykit.report.write",
    "stabilitykit.formats",
)


@pytest.mark.parametrize(
    ("module", "torch_follows"), [*((name, False) for name in TORCHLESS), ("stabilitykit.models.gemma", True)]
)
def test_torch_is_imported_only_where_it_is_needed(module: str, torch_follows: bool) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == torch_follows


def test_a_recording_is_read_and_explained_where_there_is_no_torch(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Linear(2, 2)
    with torch.no_grad(), stabilitykit.record(model) as recording:
        model(torch.tensor([[float("inf"), 0.0]]))
    recording.save(tmp_path / "run.parquet")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from stabilitykit import Recording, verdict\n"
        f"print(verdict(Recording.load(Path({str(tmp_path / 'run.parquet')!r}))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the first tensor that is not finite" in result.stdout


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("stabilitykit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
        (entries,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "[pytest11]\nstabilitykit = stabilitykit.gate.pytest_plugin" in archive.read(entries).decode()
    assert "stabilitykit/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"stabilitykit"}
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    texts = {str(path.relative_to(ROOT)) for path in (PACKAGE / "run" / "texts").iterdir()}
    assert texts
    assert texts <= set(names)
    files = [path for path in (PACKAGE / "report").rglob("*.*") if path.is_file() and path.suffix != ".pyc"]
    page = {str(path.relative_to(ROOT)) for path in files}
    assert {"stabilitykit/report/explorer/script/map.js", "stabilitykit/report/page.html.jinja"} <= page <= set(names)
    code = "import sys; sys.path.insert(0, sys.argv.pop()); from stabilitykit.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", code, "reproduce", "--list", str(tmp_path / "unpacked")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "float16-overflow" in shown.stdout
