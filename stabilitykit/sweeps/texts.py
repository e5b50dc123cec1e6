"""The files that an experiment's `prompt = "@..."` stands for: one, those in a folder, those that a pattern matches."""

from pathlib import Path

from stabilitykit.errors import MisuseError
from stabilitykit.run.inputs import TEXTS

_MAGIC = "*?["


def prompt_names(name: str, folder: Path) -> list[str]:
    """`@FILE` for each text in `@FOLDER`, or for each file that `@PATTERN` matches, in the order of their names.

    Patterns are those of `Path.glob`; hidden files match none. A relative name is looked for in `folder`. Any other
    prompt is itself. Raises MisuseError for a folder without texts, and for a pattern that matches no file.
    """
    if not name.startswith("@"):
        return [name]
    written = Path(name[1:])
    place = folder / written
    if place.is_dir():
        found = sorted(path.name for path in place.iterdir() if path.suffix in TEXTS and _is_shown(path))
        if not found:
            raise MisuseError(f"{place} holds no prompt: a file that ends in {' or '.join(TEXTS)}.")
        return [f"@{written / one}" for one in found]
    if place.exists() or not any(sign in name for sign in _MAGIC):
        return [name]
    root = Path(written.anchor) if written.is_absolute() else folder
    matched = sorted(path for path in root.glob(str(written.relative_to(written.anchor))) if _is_shown(path))
    if not matched:
        raise MisuseError(
            f"{str(written)!r} matches no file in {root.absolute()}. Check the pattern, or name a folder."
        )
    return [f"@{path if written.is_absolute() else path.relative_to(folder)}" for path in matched]


def _is_shown(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")
