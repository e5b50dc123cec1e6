"""Scripts, run by an interpreter that has torch and safetensors, and in which stabilitykit cannot be imported."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

_RUN = """
import contextlib, io, json, runpy, sys
sys.path.append(sys.argv[1])
sys.modules["stabilitykit"] = None
try:
    import stabilitykit
except ImportError:
    pass
else:
    sys.exit("stabilitykit can be imported")
printed = []
for script in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(script, run_name="__main__")
    printed.append(out.getvalue().splitlines())
print(json.dumps(printed))
"""


def run_alone(scripts: Sequence[Path]) -> list[list[str]]:
    """The lines that each script prints. Neither paths of this process nor those that site adds are there."""
    packages = Path(torch.__file__).parent.parent
    command = [sys.executable, "-I", "-S", "-c", _RUN, str(packages), *map(str, scripts)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert ran.returncode == 0, ran.stderr
    printed: list[list[str]] = json.loads(ran.stdout)
    return printed


def told(script: Path) -> list[str]:
    """The lines that a script's docstring says it prints."""
    docstring = script.read_text().split('"""')[1]
    return [line.removeprefix("    ") for line in docstring.split("It prints:\n\n")[1].rstrip("\n").split("\n")]
