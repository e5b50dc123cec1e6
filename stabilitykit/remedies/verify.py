"""An exported repair, checked again: its files against their hashes, its numbers against float32."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stabilitykit.commands import folder_for, line
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.proof.check import Checked, check
from stabilitykit.records.document import from_document
from stabilitykit.records.remedies import Ranking
from stabilitykit.records.repaired_folder import FolderCheck, RepairedFolder
from stabilitykit.remedies.export import FACTS, SCHEMA, source_folder
from stabilitykit.remedies.repair import open_original
from stabilitykit.remedies.repaired_folder import verify_checked
from stabilitykit.run.case import Progress, stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """`check` is what was compared, and whether with the original; `problems` are sentences."""

    check: FolderCheck
    problems: tuple[str, ...]


def verify(folder: str | Path, *, trust_remote_code: bool = False, progress: Progress | None = None) -> Verified:
    """Checks a repaired model's files against their hashes, and what it computes against the original, bit by bit.

    Without the original, the folder with its scaling undone takes its place, and the result says so.

    Args:
        folder: what `repair(..., out=folder)` wrote.
        trust_remote_code: run Python code that the folder brings.
        progress: called with (what is being done, how much of it is done, out of how much).

    Returns:
        Verified: `problems` are sentences, none where everything is as it was written.

    Raises:
        MisuseError: for a folder that holds no repair.
        CheckpointError: for an original that is not the one it was.

    >>> import tempfile
    >>> from stabilitykit import repair
    >>> tiny = "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&head_dim=8&vocabulary=512&context=32"
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     found = repair(tiny, out=f"{parent}/repaired")
    ...     verify(f"{parent}/repaired").problems
    ()
    """
    folder = Path(folder)
    facts, ranking = read_facts(folder)
    with ExitStack() as stack:
        place = _source(ranking, stack, trust_remote_code, progress)
        check, problems = verify_checked(
            folder, replace(facts, source=place), trust_remote_code=trust_remote_code, progress=progress
        )
    return Verified(check=check, problems=problems)


def _source(ranking: Ranking, stack: ExitStack, trust_remote_code: bool, progress: Progress | None) -> str:
    """Where the original lies, for as long as `stack` lasts; a name that is no folder's where it is not to be had."""
    try:
        original = open_original(ranking.checkpoint, trust_remote_code=trust_remote_code, progress=progress)
    except MisuseError:
        return ranking.checkpoint
    if original.sha256 != ranking.sha256:
        raise CheckpointError(
            f"The original, {ranking.checkpoint}, had the SHA-256 {ranking.sha256[:12]} and now has "
            f"{original.sha256[:12]}. Bring it back, or move what is there away, to verify without it."
        )
    return str(stack.enter_context(source_folder(original)))


def verify_proof(folder: str | Path, *, progress: Progress | None = None) -> Checked:
    """Proves from the weights in `folder` alone that no prompt makes a tensor overflow in float16.

    Nothing runs, and no original is needed: bounds are computed by code that shares nothing with what chose them.

    Args:
        folder: what `repair(..., proved=True, out=folder)` wrote.
        progress: as in `verify`.

    Returns:
        Checked: `problems` are sentences, none where it is proved; `bounds` are magnitudes by kind of tensor.

    Raises:
        MisuseError: for a folder without proof.json.

    >>> import tempfile
    >>> from stabilitykit import repair
    >>> tiny = "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&head_dim=8&vocabulary=512&context=32"
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     found = repair(tiny, proved=True, out=f"{parent}/repaired")
    ...     proof = verify_proof(f"{parent}/repaired")
    >>> proof.problems, proof.bounds["residual"] < 65504
    ((), True)
    """
    if not (Path(folder) / "proof.json").is_file():
        _, ranking = read_facts(Path(folder))
        command = line("repair", ranking.checkpoint, "--proved", "--out", f"{folder}-proved")
        raise MisuseError(f"{folder} has no proof.json. Write a model that has one with `{command}`.")
    return check(Path(folder), progress=stage("proving layers", progress))


def read_facts(folder: Path) -> tuple[RepairedFolder, Ranking]:
    """What repair.json says. Raises MisuseError where there is none, or one of another version."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["schema"] != SCHEMA:
            raise MisuseError(f"{folder / FACTS} has schema {facts['schema']}, and this version reads {SCHEMA}.")
        return from_document(RepairedFolder, facts["folder"]), from_document(Ranking, facts["ranking"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, MisuseError):
            raise
        raise MisuseError(
            f"{folder} has no {FACTS} that can be read, so it is no repaired model. Make one with "
            f"`{line('repair', folder, '--out', folder_for(str(folder)))}`."
        ) from None
