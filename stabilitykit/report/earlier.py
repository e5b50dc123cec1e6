"""An earlier report in the same folder: which files are its own, and whether its figures can stay.

A figure takes most of a report's time. It stays where its data, the code that draws it and its two files are what they
were when it was drawn.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from stabilitykit.errors import MisuseError
from stabilitykit.files import write_json
from stabilitykit.report.figures import Drawing

MANIFEST = "report.files.json"
PDF = "report.pdf"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OURS = re.compile(rf"figures/{NAME.pattern}\.(svg|png)|tables/{NAME.pattern}\.csv|{re.escape(PDF)}")
_OWN = {MANIFEST, PDF, "report.html", "report.md"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """`files` are the paths of a report's figures and tables in its folder, `drawn` the SHA-256 of those that are
    figures, `made_from` the `fingerprint` of what they were drawn from; None where it is not known.
    """

    files: frozenset[str] = frozenset()
    made_from: str | None = None
    drawn: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Earlier":
        """What the folder's list says; nothing where there is none. Raises MisuseError for one that is not ours."""
        path = folder / MANIFEST
        if not path.exists():
            return cls()
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            listed = None
        if isinstance(listed, list):  # as reports listed their files before they kept figures
            listed = {"files": listed}
        match listed:
            case {"files": [*files]} if all(isinstance(name, str) and _OURS.fullmatch(name) for name in files):
                drawn, made_from = listed.get("drawn"), listed.get("made_from")
                known = isinstance(drawn, dict) and isinstance(made_from, str)
                return cls(files=frozenset(files), made_from=made_from if known else None, drawn=drawn if known else {})
        raise MisuseError(f"{path} lists a report's figures and tables; this one does not. Delete it and try again.")

    def drawing(self, folder: Path, name: str) -> Drawing | None:
        """A figure's files as they lie in the folder; None where one of them is not what was drawn."""
        content = []
        for kind in ("svg", "png"):
            path = f"figures/{name}.{kind}"
            try:
                content.append((folder / path).read_bytes())
            except OSError:
                return None
            if self.drawn.get(path) != hashlib.sha256(content[-1]).hexdigest():
                return None
        return Drawing(svg=content[0].decode(), png=content[1])

    def write(self, folder: Path) -> None:
        write_json(
            folder / MANIFEST,
            {"files": sorted(self.files), "made_from": self.made_from, "drawn": dict(sorted(self.drawn.items()))},
        )


def fingerprint(folder: Path, *settings: str) -> str:
    """SHA-256 of all files in `folder` but a report's own, of `settings`, and of the code that draws."""
    digest = hashlib.sha256(_code().encode())
    for setting in settings:
        digest.update(f"{setting}\0".encode())
    _add(digest, folder, (path for path in folder.rglob("*") if not _is_the_reports(path.relative_to(folder))))
    return digest.hexdigest()


def _is_the_reports(path: Path) -> bool:
    return path.parts[0] in ("figures", "tables") or str(path) in _OWN or path.name.startswith(".")


@functools.cache
def _code() -> str:
    digest = hashlib.sha256(f"matplotlib {version('matplotlib')} numpy {version('numpy')}".encode())
    package = Path(__file__).parents[1]
    _add(digest, package, package.rglob("*.py"))
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", folder: Path, paths: Iterable[Path]) -> None:
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
