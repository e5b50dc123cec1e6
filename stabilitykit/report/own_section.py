"""A section that an experiment brings along: a Python file beside its TOML, with a function `section(results)`.

The file is the code of whoever wrote the experiment, and runs with the rights of whoever draws the report. So only a
file that the experiment itself names is ever loaded, and only as it was when the sweep read the experiment. It may
import its neighbours relatively: `from .figures import bars`.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from stabilitykit.errors import MisuseError
from stabilitykit.records.sweep import Plan, Results
from stabilitykit.report.blocks import Section


def own_section(plan: Plan, path: str) -> Callable[[Results], Section]:
    """The function `section` of a file that `plan.own_sections` names.

    Raises MisuseError where the file is not there, is not the one that the sweep saw, or has no such function.
    """
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        raise MisuseError(
            f"This report has a section of its own, {path}, which is not there. Run the command in the folder in which "
            "the sweep was started."
        ) from None
    if digest != plan.own_sections[path]:
        raise MisuseError(
            f"{path} has changed since the sweep. To draw the report with it as it is now, run `{plan.command}` again: "
            "finished cases are kept."
        )
    section: Callable[[Results], Section] | None = getattr(load(Path(path)), "section", None)
    if not callable(section):
        raise MisuseError(f"A section's file defines section(results), and {path} does not.")
    return section


def load(path: Path) -> ModuleType:
    """Runs the file and returns it as a module, in which the file's folder is the package to import from."""
    name = f"stabilitykit_section_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent.resolve())])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
