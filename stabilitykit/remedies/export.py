"""A repaired model as a folder that plain transformers runs in float16, and the means to check it.

FOLDER/
  config.json, weights, tokenizer and generation config
  repair.json   what was changed, by which powers of two; hashes and figures, before and after
  proof.json    of a proved repair: bounds that no prompt can exceed
  README.md     the same for people, the terms of the weights, and how to verify
"""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch

from stabilitykit.checkpoints import Checkpoint, GemmaConfig, open_checkpoint
from stabilitykit.checkpoints.export import write_folder
from stabilitykit.choices import ExportDtype
from stabilitykit.diagnosis.bounds import by_kind
from stabilitykit.diagnosis.remedies import how_scaled, in_the_way, moved
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.files import check_new, new_folder, write_json
from stabilitykit.proof.check import check
from stabilitykit.proof.write import sha256, write_proof
from stabilitykit.records.document import to_document
from stabilitykit.remedies.original import GemmaOriginal, scaled_checkpoint
from stabilitykit.remedies.repaired import Repair
from stabilitykit.run.case import Progress, stage

SCHEMA = 3
FACTS = "repair.json"


def export(repair: Repair, folder: Path, dtype: ExportDtype = "float16", *, progress: Progress | None = None) -> Path:
    """Writes a repaired model into the new `folder`, aside and then renamed, and returns it.

    What was written is read back and compared, bit by bit, and a proof is checked, before it gets its name. Raises
    MisuseError where `folder` holds something already or cannot be written, and for a repair that is not finite or a
    proof of other weights than float16's; CheckpointError where what was read back is not what was to be written, or a
    proof is not accepted.
    """
    check_new(folder)
    if repair.bounds and dtype != "float16":
        raise MisuseError("A proof holds for weights stored in float16 only; leave out either --dtype or --proved.")
    if not repair.finite:
        raise MisuseError(
            "The repaired model is not finite in float16 on the held-out texts, so it is not written. Try a larger "
            "--margin, or --prompts with texts like those that it has to run."
        )
    with new_folder(folder) as aside:
        gains = _write(repair, aside, dtype, progress)
        hashes = {path.name: sha256(path) for path in sorted(aside.iterdir())}
        write_json(aside / FACTS, _facts(repair, dtype, hashes, gains))
        (aside / "README.md").write_text(_readme(repair, dtype, sum(gains.values())), encoding="utf-8")
        if repair.bounds:
            write_proof(aside, {row.worst.kind: row.worst.bound for row in by_kind(repair.bounds)})
            _check(aside)
    return folder


def _write(repair: Repair, aside: Path, dtype: ExportDtype, progress: Progress | None) -> dict[str, int]:
    """Writes the model, reads it back, and returns how many gains of each norm storing it in `dtype` rounded."""
    original = repair.original
    assert isinstance(original, GemmaOriginal)
    after = scaled_checkpoint(original.checkpoint, repair.ranking.scaling)
    source = Path(original.source)
    folder = source if source.is_dir() else None
    write_folder(after, aside, dtype, source=folder, progress=stage("writing", progress))
    _compare(open_checkpoint(aside), after, getattr(torch, dtype))
    return stored_gains(after, getattr(torch, dtype))


def stored_gains(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """How many gains of each norm are rounded by storing the checkpoint in `dtype`; norms without any are left out."""
    found = {}
    for name in checkpoint.tensors:
        if name.endswith("norm.weight"):  # no other is read: a scaled tensor is computed on request
            tensor = checkpoint.tensors[name]
            lost = int((tensor.float() != tensor.to(dtype).float()).sum())
            if lost:
                found[name] = lost
    return found


def _check(folder: Path) -> None:
    """A proof that its own checker does not accept is not written."""
    problems = check(folder).problems
    if problems:
        raise CheckpointError(f"The proof was not accepted by its checker: {' '.join(problems)}")


def _in_layers(config: GemmaConfig) -> GemmaConfig:
    """Without what a folder cannot say: how far beyond its last layer the first global one would be."""
    return replace(config, global_every=min(config.global_every, config.layers + 1))


def _compare(written: Checkpoint, wanted: Checkpoint, dtype: torch.dtype) -> None:
    if _in_layers(written.config) != _in_layers(wanted.config):
        raise CheckpointError(f"{written.source}: config.json reads back differently from what was written.")
    for name, tensor in wanted.tensors.items():
        if not torch.equal(written.tensors[name], tensor.to(dtype)):
            raise CheckpointError(
                f"{written.source}: {name} reads back differently from what was written. Is the disk full?"
            )


def _facts(repair: Repair, dtype: str, hashes: dict[str, str], gains: dict[str, int]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "dtype": dtype,
        "sha256": hashes,
        "gains_rounded_in_storage": gains,
        "ranking": to_document(repair.ranking),
    }


def _readme(repair: Repair, dtype: str, gains: int) -> str:
    original, ranking = repair.original, repair.ranking
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("stabilitykit.remedies", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("readme.md.jinja")
    scores = {score.name: score for score in ranking.scores}
    return template.render(
        name=Path(original.source.removeprefix("hf:")).name,
        source=original.source,
        facts=FACTS,
        dtype=dtype,
        how=how_scaled(ranking),
        in_the_way=in_the_way(ranking),
        moved=moved(ranking.scaling),
        gains=gains,
        ranking=ranking,
        score=ranking.repaired,
        plain=scores.get("float16"),
        wide=scores.get("bfloat16"),
        is_gemma=isinstance(original, GemmaOriginal) and not original.source.startswith("random:"),
        version=version("stabilitykit"),
    )
