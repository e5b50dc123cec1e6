"""Writes proof.json: the proved bounds of a folder's weights, and the hashes of the files that they hold for.

`stabilitykit.proof.check` documents the format and shares no code with this file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

LIMIT = 65_504


def write_proof(folder: Path, bounds: Mapping[str, float]) -> Path:
    """Writes proof.json into a Hugging Face folder in float16; `bounds` are largest magnitudes by kind of tensor.

    Bounds above the limit are written too. Raises ValueError for NaN and infinities, OSError for files that cannot be
    read or written.
    """
    names = sorted(
        path.name for pattern in ("config.json", "*.safetensors", "*.index.json") for path in folder.glob(pattern)
    )
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
