"""proof.json: what a folder's weights were proved to be bounded by, and the hashes of what was examined.

`stabilitykit.proof.check` documents the format, and does not share this code.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

LIMIT = 65_504


def write_proof(folder: Path, bounds: Mapping[str, float]) -> Path:
    """Writes proof.json into a Hugging Face folder in float16; `bounds` are largest magnitudes by kind of tensor.

    They are written as they are, above the limit too; NaN and infinities raise ValueError, and files that cannot be
    read or written OSError.
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
