"""A repaired model as a folder that plain transformers runs in float16, and the means to check it.

FOLDER/
  config.json, weights, tokenizer and generation config
  adapter/      that which the model came with, if any, scaled with it
  repair.json   what was changed, by which powers of two; hashes and figures, before and after
  proof.json    of a proved repair: bounds that no prompt can exceed
  README.md     the same for people, the terms of the weights, and how to verify; REPAIR.md where the original has one
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2

from stabilitykit.checkpoints.export import write_folder
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import CONFIG
from stabilitykit.choices import ExportDtype
from stabilitykit.diagnosis.bounds import by_kind
from stabilitykit.diagnosis.remedies import how_scaled, in_the_way, moved
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.files import check_new, new_folder, write_json
from stabilitykit.proof.check import check
from stabilitykit.proof.write import write_proof
from stabilitykit.records.document import to_document
from stabilitykit.records.repaired_folder import RepairedFolder
from stabilitykit.records.scaling import Scaling
from stabilitykit.remedies.adapter import write_scaled_adapter
from stabilitykit.remedies.original import CALLED, GemmaOriginal, HuggingFaceOriginal, Original
from stabilitykit.remedies.repaired import Repair
from stabilitykit.remedies.repaired_folder import write_checked
from stabilitykit.run.case import Progress

SCHEMA = 3
FACTS, README, BESIDE = "repair.json", "README.md", "REPAIR.md"
ADAPTER = "adapter"

_LENGTHS = (40, 24, 9)  # tokens of the texts on which a folder is checked


def export(repair: Repair, folder: Path, dtype: ExportDtype = "float16", *, progress: Progress | None = None) -> Path:
    """Writes a repaired model into the new `folder`, aside and then renamed, and returns it.

    What was written is loaded again and compared, bit by bit, and a proof is checked, before it gets its name. Raises
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
        written = _write(repair, folder, aside, dtype, progress)
        write_json(aside / FACTS, _facts(repair, written))
        readme = aside / README
        readme = aside / BESIDE if readme.exists() else readme  # the original's own was carried along
        readme.write_text(_readme(repair, written), encoding="utf-8")
        if repair.bounds:
            write_proof(aside, {row.worst.kind: row.worst.bound for row in by_kind(repair.bounds)})
            _check(aside)
    return folder


def _write(repair: Repair, folder: Path, aside: Path, dtype: ExportDtype, progress: Progress | None) -> RepairedFolder:
    """Writes the model and checks it in plain transformers, on inputs that nothing was chosen by; an adapter, scaled
    with it, goes into a folder of its own.
    """
    scaling = in_folder(repair.original, repair.ranking.scaling)
    with source_folder(repair.original) as source:
        made = write_checked(
            source,
            scaling,
            aside,
            _prompts(repair),
            dtype,
            approximate=repair.ranking.change.approximate is not None,
            trust_remote_code=repair.original.trust_remote_code,
            progress=progress,
        )
        adapter = repair.original.how.get("adapter") if isinstance(repair.original, HuggingFaceOriginal) else None
        if adapter is not None:
            (aside / ADAPTER).mkdir()
            trusted = repair.original.trust_remote_code
            write_scaled_adapter(
                Path(adapter), source, scaling, aside / ADAPTER, base=str(folder), trust_remote_code=trusted
            )
    return replace(made, source=repair.original.source)


def _prompts(repair: Repair) -> list[list[int]]:
    """Token ids of held-out texts, of different lengths; a number that draws inputs, for models that read no text."""
    texts = [one["input_ids"][0].tolist() for one in repair.samples.held_out if "input_ids" in one]
    return [ids[:length] for ids, length in zip(texts, _LENGTHS, strict=False)] or [[1], [2]]


@contextmanager
def source_folder(original: Original) -> Iterator[Path]:
    """The Hugging Face folder that a model lies in; of one in another format, or whose text part alone was read, one
    that is made of it, in float32, for as long as the block lasts.
    """
    if isinstance(original, HuggingFaceOriginal):
        yield local_folder(original.name)
        return
    assert isinstance(original, GemmaOriginal)
    place = Path(original.source.removeprefix("hf:"))
    if original.source.startswith("hf:"):
        place = local_folder(str(place))
    if is_text_folder(place):
        yield place
        return
    with TemporaryDirectory(prefix="stabilitykit-") as made:
        write_folder(original.checkpoint, Path(made), "float32", source=place if place.is_dir() else None)
        yield Path(made)


def is_text_folder(place: Path) -> bool:
    """Whether a folder's config names the causal language model of a Gemma's text, and nothing beside it."""
    try:
        raw = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = raw.get("architectures") or [""]
    return str(named[0]).endswith("ForCausalLM") and "vision_config" not in raw


def in_folder(original: Original, scaling: Scaling) -> Scaling:
    """`scaling` by the names that plain transformers has for parameters and settings."""
    if not isinstance(original, GemmaOriginal):
        own = {_without_adapter(name): factor for name, factor in scaling.parameters.items() if ".lora_" not in name}
        return replace(scaling, parameters=own)
    return Scaling(
        parameters={f"model.{name}": factor for name, factor in scaling.parameters.items()},
        settings={CALLED[key]: exponent for key, exponent in scaling.settings.items()},
    )


def _without_adapter(name: str) -> str:
    """A parameter's name in the model that an adapter of peft's is around."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _check(folder: Path) -> None:
    """A proof that its own checker does not accept is not written."""
    problems = check(folder).problems
    if problems:
        raise CheckpointError(f"The proof was not accepted by its checker: {' '.join(problems)}")


def _facts(repair: Repair, written: RepairedFolder) -> dict[str, Any]:
    return {"schema": SCHEMA, "folder": to_document(written), "ranking": to_document(repair.ranking)}


def _readme(repair: Repair, made: RepairedFolder) -> str:
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
        dtype=made.written.dtype,
        rounded=sum(cast.rounded for cast in made.written.casts.values()),
        how=how_scaled(ranking),
        in_the_way=in_the_way(ranking),
        moved=moved(made.scaling),
        ranking=ranking,
        score=ranking.repaired,
        plain=scores.get("float16"),
        wide=scores.get("bfloat16"),
        is_gemma=isinstance(original, GemmaOriginal) and not original.source.startswith("random:"),
        version=version("stabilitykit"),
    )
