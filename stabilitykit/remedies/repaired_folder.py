"""A scaled folder from beginning to end: written, loaded again, compared; and verified later, from what was kept."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stabilitykit.checkpoints.cache import cache_folder, file_sha256
from stabilitykit.checkpoints.huggingface import weight_files
from stabilitykit.choices import ExportDtype
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.transformers.backend import imported
from stabilitykit.proof.write import sha256
from stabilitykit.records.repaired_folder import FolderCheck, RepairedFolder
from stabilitykit.records.scaling import Scaling
from stabilitykit.remedies.folder import write_scaled
from stabilitykit.remedies.folder_check import check_alone, check_folder
from stabilitykit.run.case import Progress, stage


def write_checked(
    source: Path,
    scaling: Scaling,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    dtype: ExportDtype = "float16",
    *,
    approximate: bool = False,
    kind: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> RepairedFolder:
    """Writes the model in `source`, scaled, into the empty `folder`, as `write_scaled` does, and checks it.

    `prompts` are token ids, better of texts that nothing was chosen by. `kind` is the name of the class of
    transformers' whose parameters `scaling` names, None for the one in the config. What an `approximate` scaling
    computes in float32 may differ. Raises CheckpointError where a
    comparison fails or float16 is not finite, and as `write_scaled` does; `folder` then holds what was written.
    """
    given: dict[str, Any] = {"kind": _class(kind), "trust_remote_code": trust_remote_code}
    written = write_scaled(source, scaling, folder, dtype, progress=stage("writing", progress), **given)
    check = check_folder(source, folder, scaling, prompts, dtype, progress=progress, **given)
    check = replace(check, approximate=approximate)
    if check.problems:
        raise CheckpointError(f"The scaled folder is not what it should be: {'; '.join(check.problems)}.")
    return RepairedFolder(
        source=str(source),
        source_sha256=_source_sha256(source),
        scaling=scaling,
        written=written,
        check=check,
        kind=kind,
    )


def verify_checked(
    folder: Path,
    facts: RepairedFolder,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[FolderCheck, tuple[str, ...]]:
    """Checks `folder` again, of which `facts` were kept: the new check, and in sentences all that is wrong.

    Files must have the digests that they had. With the original where it was, and its weights unchanged, everything is
    compared again; without it, the folder with its scaling undone takes its place, and the check says so. Raises
    CheckpointError for an original whose weights are no longer what they were, and for a folder that cannot be loaded.
    """
    problems = [
        f"{name} has changed since it was written: its SHA-256 differs"
        for name, wanted in facts.written.sha256.items()
        if not (folder / name).is_file() or sha256(folder / name) != wanted
    ]
    given: dict[str, Any] = {"kind": _class(facts.kind), "trust_remote_code": trust_remote_code, "progress": progress}
    source = Path(facts.source)
    if source.is_dir():
        if _source_sha256(source) != facts.source_sha256:
            raise CheckpointError(
                f"{folder} was made from {source}, whose weights have changed since. Bring the original back, or move "
                "what is there away, to verify without it."
            )
        check = check_folder(source, folder, facts.scaling, facts.check.prompts, facts.written.dtype, **given)
    else:
        check = check_alone(folder, facts.scaling, facts.check, facts.written.dtype, **given)
    check = replace(check, approximate=facts.check.approximate)
    return check, (*problems, *check.problems)


def _class(kind: str | None) -> Any:
    if kind is None:
        return None
    found = getattr(imported(), kind, None)
    if found is None:
        raise MisuseError(f"transformers has no class {kind}; leave it out for the one that the config names.")
    return found


def _source_sha256(source: Path) -> dict[str, str]:
    return {path.name: file_sha256(path, cache_folder()) for path in weight_files(source)}
