"""A repaired checkpoint as a folder that plain transformers runs in float16, and the means to check it.

FOLDER/
  config.json, model.safetensors, tokenizer and generation config
  repair.json   what was changed, by which factor; hashes and figures, before and after
  proof.json    of a proved repair: bounds that no prompt can exceed
  README.md     the same for people, the terms of the weights, and how to verify
"""

import math
from collections.abc import Callable
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
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.files import check_new, new_folder, write_json
from stabilitykit.proof.check import check
from stabilitykit.proof.write import sha256, write_proof
from stabilitykit.records.document import to_document
from stabilitykit.remedies.repaired import Repair
from stabilitykit.remedies.rescale import stored_gains

SCHEMA = 2
FACTS = "repair.json"


def export(
    before: Checkpoint,
    repair: Repair,
    folder: Path,
    dtype: ExportDtype = "float16",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `repair` of the checkpoint `before` into the new `folder`, aside and then renamed, and returns it.

    What was written is read back and compared, bit by bit, and a proof is checked, before it gets its name. Raises
    MisuseError where `folder` holds something already or cannot be written, and for a repair that is not finite or a
    proof of other weights than float16's; CheckpointError where what was read back is not what was to be written, or a
    proof is not accepted.
    """
    check_new(folder)
    if repair.bounds and dtype != "float16":
        raise MisuseError("A proof holds for weights stored in float16 only; leave out either --dtype or --proved.")
    if not repair.ranking.repaired.finite:
        raise MisuseError(
            "The repaired checkpoint is not finite in float16 on the held-out texts, so it is not written. Try a "
            "larger --margin, or --prompts with texts like those that it has to run."
        )
    after = repair.rescaled.checkpoint
    source = Path(before.source)
    with new_folder(folder) as aside:
        files = write_folder(after, aside, dtype, source=source if source.is_dir() else None, progress=progress)
        gains = stored_gains(after, getattr(torch, dtype))
        facts = _facts(before, repair, dtype, {path.name: sha256(path) for path in files}, gains)
        write_json(aside / FACTS, facts)
        (aside / "README.md").write_text(_readme(before, repair, dtype, sum(gains.values())), encoding="utf-8")
        _compare(open_checkpoint(aside), after, getattr(torch, dtype))
        if repair.bounds:
            write_proof(aside, {row.worst.kind: row.worst.bound for row in by_kind(repair.bounds)})
            _check(aside)
    return folder


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


def _facts(
    before: Checkpoint, repair: Repair, dtype: str, hashes: dict[str, str], gains: dict[str, int]
) -> dict[str, Any]:
    after = repair.rescaled.checkpoint
    return {
        "schema": SCHEMA,
        "remedy": "rescale",
        "rms_norm_eps": {"before": before.config.rms_eps, "after": after.config.rms_eps},
        "dtype": dtype,
        "weights_sha256": hashes,
        "gains_rounded_in_storage": gains,
        "ranking": to_document(repair.ranking),
    }


def _readme(before: Checkpoint, repair: Repair, dtype: str, gains: int) -> str:
    after, ranking = repair.rescaled.checkpoint, repair.ranking
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("stabilitykit.remedies", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("readme.md.jinja")
    return template.render(
        name=Path(before.source).name,
        source=before.source,
        facts=FACTS,
        dtype=dtype,
        exponent=round(math.log2(ranking.gamma)),
        eps=(before.config.rms_eps, after.config.rms_eps),
        config=before.config,
        betas=", ".join(f"2^{round(math.log2(beta))}" for beta in ranking.inner),
        gains=gains,
        ranking=ranking,
        score=ranking.repaired,
        plain=ranking["float16"],
        wide=ranking["bfloat16"],
        is_random=before.source.startswith("random:"),
        version=version("stabilitykit"),
    )
