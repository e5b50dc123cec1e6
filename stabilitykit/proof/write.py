"""Writes proof.json: the proved bounds of a folder's weights, and the hashes of the files that they hold for.

`stabilitykit.proof.check` documents the format and shares no code with this file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

LIMIT = 65_504
BESIDE = {"proof.json", "README.md", "repair.json"}
"""What lies beside a model and decides nothing; all other files are hashed, but for names that begin with a dot."""


def write_proof(folder: Path, bounds: Mapping[str, float]) -> Path:
    """Writes proof.json into a Hugging Face folder in float16; `bounds` are largest magnitudes by kind of tensor.

    Bounds above the limit are written too. Raises ValueError for NaN and infinities, OSError for files that cannot be
    read or written.
    """
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    visible = {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}
    names = sorted(visible - BESIDE)
    proof = {
        "schema": 1,
        "dtype": "float16",
        "limit": LIMIT,
        "sha256": {name: sha256(folder / name) for name in names},
        "bounds": {kind: float(bound) for kind, bound in bounds.items()},
    }
    canonical = json.dumps(proof, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(canonical.encode("ascii")).hexdigest()
    path = folder / "proof.json"
    path.write_text(json.dumps(proof | {"digest": digest}, indent=2) + "\n", encoding="utf-8")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
