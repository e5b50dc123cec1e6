"""An exported repair, checked again: its files against their hashes, its numbers against float32."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabilitykit.checkpoints import open_checkpoint
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.proof.check import Checked, check
from stabilitykit.proof.write import sha256
from stabilitykit.records.document import from_document
from stabilitykit.records.remedies import Ranking, Score
from stabilitykit.remedies.export import FACTS, SCHEMA
from stabilitykit.remedies.original import GemmaOriginal, setting
from stabilitykit.remedies.ranking import compare
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.repair import open_original
from stabilitykit.remedies.samples import samples_for
from stabilitykit.run.case import Progress, stage

TOLERANCE = 0.1  # of the mean KL: kernels of another processor sum in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """`score` is that of the folder's weights, `promised` the mean KL in repair.json, `problems` are sentences."""

    score: Score
    promised: float | None
    problems: tuple[str, ...]


def verify(folder: str | Path, *, progress: Progress | None = None) -> Verified:
    """Checks a repaired checkpoint's files against their hashes, and its logits against those of the original.

    The original is opened again, and the comparison repeated on the same held-out texts.

    Args:
        folder: what `repair(..., out=folder)` wrote.
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
    facts = read_facts(folder)
    problems = [
        f"{name} has changed since it was written: its SHA-256 differs"
        for name, wanted in facts["sha256"].items()
        if not (folder / name).is_file() or sha256(folder / name) != wanted
    ]
    ranking = from_document(Ranking, facts["ranking"])
    original = open_original(ranking.checkpoint, progress=progress)
    if original.sha256 != ranking.sha256:
        raise CheckpointError(
            f"{folder} was made from {ranking.checkpoint} with SHA-256 {ranking.sha256[:12]}, which now has "
            f"{original.sha256[:12]}. Bring the original back."
        )
    assert isinstance(original, GemmaOriginal)
    after = open_checkpoint(folder)
    for key, known in ranking.change.settings.items():
        found = setting(GemmaOriginal(after).settings, key)
        if found != known.after:
            problems.append(f"{key} is {found:g} and was {known.after:g}")
    promised = None if ranking.repaired is None else ranking.repaired.kl_mean
    exported = Remedy(name="this folder", summary="The exported weights in float16.")
    held_out = samples_for(original.open()).held_out
    score = compare(original, exported, GemmaOriginal(after).open("float16"), held_out, progress=progress)
    if not score.finite or score.kl_mean is None:
        problems.append("in float16 it is not finite")
    elif promised is not None and score.kl_mean > promised * (1 + TOLERANCE):
        problems.append(f"its mean KL to float32 is {score.kl_mean:.3g} and was {promised:.3g}")
    return Verified(score=score, promised=promised, problems=tuple(problems))


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
        raise MisuseError(f"{folder} has no proof.json. Write one with `stabilitykit repair --proved --out`.")
    return check(Path(folder), progress=stage("proving layers", progress))


def read_facts(folder: Path) -> dict[str, Any]:
    """What repair.json says. Raises MisuseError where there is none, or one of another version."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MisuseError(
            f"{folder} has no {FACTS} that can be read, so it is no repaired checkpoint. Make one with `stabilitykit "
            "repair --out`."
        ) from None
    if facts.get("schema") != SCHEMA:
        raise MisuseError(f"{folder / FACTS} has schema {facts.get('schema')}, and this version reads {SCHEMA}.")
    return facts
