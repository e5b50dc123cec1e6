"""A folder of transformers' with its weights and settings scaled, all else as it was, written one piece at a time.

    with new_folder(Path("repaired")) as aside:
        written = write_scaled(Path("original"), scaling, aside)

Tensors keep their names and their files, and every other file is carried along as it is.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabilitykit.checkpoints.cache import Progress
from stabilitykit.checkpoints.export import folder_json
from stabilitykit.checkpoints.huggingface import CONFIG, tensors_of, weight_files
from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.checkpoints.safetensors_writer import Written, write_safetensors
from stabilitykit.choices import ExportDtype
from stabilitykit.errors import CheckpointError
from stabilitykit.models.transformers.plain import load_placeholders, read_settings
from stabilitykit.models.transformers.quantised import find_quantised, on_scale
from stabilitykit.models.transformers.stored_names import ONE, Stored, placeholders, stored_factors
from stabilitykit.proof.write import sha256
from stabilitykit.records.repaired_folder import Cast, WrittenFolder
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.scaling.apply import factors, of_rows, scaled, with_settings

# Weights in the formats of other programs, which would be those of the model as it was.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot"}
_INDICES = (".safetensors.index.json", ".bin.index.json")
_LEFTOVERS = {".git", ".cache", ".huggingface"}
_ABOUT = {"repair.json", "proof.json", "REPAIR.md"}  # what an earlier repair says of the weights as they were


def write_scaled(
    source: Path,
    scaling: Scaling,
    folder: Path,
    dtype: ExportDtype = "float16",
    *,
    kind: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> WrittenFolder:
    """Writes the model in `source`, scaled, into the empty `folder`, in memory for a few rows of one tensor.

    `scaling` names the parameters and persistent buffers as the model does that transformers makes of `source`: of the
    class that its config names, or of `kind`. Tensors are rounded once, to `dtype` or, where transformers would keep
    one in float32 beside it, to float32; those that are no part of the model stay as they are. Weights that torch saved
    are written as safetensors. `progress` is called with the bytes written and the total.

    Raises MisuseError for a scaling of another model, CheckpointError for a folder that cannot be read, and, by name,
    for a tensor whose scaling its files cannot express, and for numbers that would become infinite.
    """
    files = {path: tensors_of(path) for path in weight_files(source)}
    tensors = {name: tensor for held in files.values() for name, tensor in held.items()}
    stored = _asked(source, tensors, scaling, getattr(torch, dtype), kind, trust_remote_code)

    hashes: dict[str, str] = {}
    casts: dict[str, Cast] = {}
    plan = {path: [_planned(name, held[name], stored, casts) for name in held] for path, held in files.items()}
    total, done = sum(one.nbytes for planned in plan.values() for one in planned), 0

    def announce(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    names = {path.name: _file_name(path) for path in files}
    for path, planned in plan.items():
        name = names[path.name]
        hashes[name] = write_safetensors(folder / name, planned, _metadata(path), progress=announce)
    _write_index(source, folder, names, total)
    left_out = _carry(source, folder)
    _write_config(source, folder, scaling.settings, dtype, trust_remote_code)
    others = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes |= {str(path.relative_to(folder)): sha256(path) for path in others if path.name not in hashes}
    return WrittenFolder(
        sha256=dict(sorted(hashes.items())),
        dtype=dtype,
        scaled=len(stored.factors),
        casts={name: cast for name, cast in sorted(casts.items()) if cast != Cast()},
        unused=stored.unused,
        left_out=left_out,
    )


def _asked(
    source: Path,
    tensors: Mapping[str, Tensor],
    scaling: Scaling,
    dtype: torch.dtype,
    kind: Any,
    trust_remote_code: bool,
) -> Stored:
    """What is to be done to each stored tensor; of quantised weights, to their scales, which keep their dtypes."""
    settings = read_settings(source, trust_remote_code=trust_remote_code).get("quantization_config")
    small = find_quantised(tensors, settings) if settings else {}
    parts = {part for one in small.values() for part in one.parts}
    plain = {name: tensor for name, tensor in tensors.items() if name not in parts}
    plain |= {name: torch.empty(one.shape, dtype=dtype, device="meta") for name, one in small.items()}
    blank = placeholders({name: (tensor.dtype, tensor.shape) for name, tensor in plain.items()})
    model = load_placeholders(source, blank, dtype, kind=kind, trust_remote_code=trust_remote_code)
    stored = stored_factors(model, plain, scaling.parameters)
    if settings is None:
        return stored
    factors = dict(stored.factors)
    for name, one in small.items():
        if name in factors:
            factors[one.scale] = on_scale(name, one, factors.pop(name))
    return Stored(
        factors=factors,
        dtypes={name: own for name, own in stored.dtypes.items() if name not in small},
        unused=stored.unused,
        exact=frozenset(one.scale for one in small.values()),
    )


def _planned(name: str, tensor: Tensor, stored: Stored, casts: dict[str, Cast]) -> Written:
    factor = stored.factors.get(name, ONE)
    dtype = stored.dtypes.get(name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype
    exponents = any(factor.exponents) and tensor.dtype == torch.uint8  # the bits of float8_e8m0fnu
    if any(factor.exponents) and not (tensor.is_floating_point() or exponents):
        raise CheckpointError(f"{name} is to be multiplied by a power of two, and holds {tensor.dtype}.")

    def pieces() -> Iterator[Tensor]:
        row, counts = 0, Cast()
        for piece in read_once(tensor):
            if not any(factor.exponents) and (dtype == piece.dtype or not piece.is_floating_point()):
                yield piece
                continue
            own = of_rows(factor, row, row + len(piece)) if piece.ndim else factor
            row += len(piece) if piece.ndim else 0
            if exponents:
                yield _added(name, piece, own)
                continue
            made = scaled(piece, own).to(dtype)
            counts = _counted(name, counts, piece, own, made)
            if counts.rounded and name in stored.exact:
                raise CheckpointError(f"{name} are scales in {dtype}, which cannot hold them once they are scaled.")
            yield made
        casts[name] = counts

    return Written(name=name, dtype=dtype, shape=tensor.shape, pieces=pieces)


def _added(name: str, piece: Tensor, factor: Factor) -> Tensor:
    """Scales that are bytes, of which each is an exponent and 127; 255 is NaN."""
    exponents = factors(factor, piece.shape).log2().to(torch.int32)
    made = torch.where(piece == 255, 255, piece.to(torch.int32) + exponents)
    if int(((made < 0) | ((made > 254) & (piece != 255))).sum()):
        raise CheckpointError(f"{name} are exponents of 8 bits, which cannot hold them once they are scaled.")
    return made.to(torch.uint8)


def _counted(name: str, before: Cast, piece: Tensor, factor: Factor, made: Tensor) -> Cast:
    """`before` and what happened to one more piece."""
    if made.dtype.itemsize == 1:  # torch computes little with them
        wrong = int((made.float() != scaled(piece, factor)).sum())
        return Cast(rounded=before.rounded + wrong)
    wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
    if int((made.isinf() & wide.isfinite()).sum()):
        raise CheckpointError(
            f"{name}: a number up to {float(wide.abs().max()):.3g}, scaled, is past the largest that {made.dtype} can "
            "hold. Ask for a larger margin, or write float32."
        )
    back = (made.to(wide.dtype) + factor.added) / factors(factor, piece.shape).to(wide) - factor.added
    return Cast(
        rounded=before.rounded + int(((back != wide) & ~wide.isnan()).sum()),
        subnormal=before.subnormal + int(((made.abs() < torch.finfo(made.dtype).tiny) & (made != 0)).sum()),
        zero=before.zero + int(((made == 0) & (wide != 0)).sum()),
    )


def _file_name(path: Path) -> str:
    if path.suffix == ".safetensors":
        return path.name
    return path.with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {"format": "pt"}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found: dict[str, str] = header.get("__metadata__", {})
    return found or {"format": "pt"}


def _write_index(source: Path, folder: Path, names: Mapping[str, str], total: int) -> None:
    for suffix, stem in zip(_INDICES, ("model", "pytorch_model"), strict=True):
        path = source / f"{stem}{suffix}"
        if path.is_file():
            index = json.loads(path.read_text(encoding="utf-8"))
            index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
            (folder / f"model{_INDICES[0]}").write_text(folder_json(index), encoding="utf-8")
            return


def _carry(source: Path, folder: Path) -> tuple[str, ...]:
    """Copies every other file, and returns the names of those that were left out."""
    left_out = []
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if not path.is_file() or inner.parts[0] in _LEFTOVERS:
            continue
        if path.name.endswith(_INDICES) or path.suffix in _WEIGHTS or str(inner) in _ABOUT:
            if not (folder / inner).exists():
                left_out.append(str(inner))
        elif str(inner) != CONFIG:
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inner)
    return tuple(left_out)


def _write_config(
    source: Path, folder: Path, exponents: Mapping[str, int], dtype: str, trust_remote_code: bool
) -> None:
    """config.json with these settings multiplied, and the dtype; it must read back as that."""
    raw: dict[str, Any] = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    before = read_settings(source, trust_remote_code=trust_remote_code)
    try:
        wanted = with_settings(before, exponents)
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{source / CONFIG} has no settings {', '.join(exponents)} that are numbers, so they cannot be scaled."
        ) from None
    for path in exponents:
        *outer, last = path.split(".")
        inner, value = raw, wanted
        for key in outer:
            inner, value = inner.setdefault(key, {}), value[key]
        inner[last] = value[last]
    _set_dtype(raw, dtype)
    (folder / CONFIG).write_text(folder_json(raw), encoding="utf-8")
    after = read_settings(folder, trust_remote_code=trust_remote_code)
    if _without_dtype(after) != _without_dtype(wanted):
        raise CheckpointError(
            f"{source / CONFIG}: transformers reads {', '.join(exponents)} back differently from what was written, so "
            "a config cannot say this scaling."
        )


def _set_dtype(raw: dict[str, Any], dtype: str) -> None:
    named = [key for key in ("dtype", "torch_dtype") if key in raw] or ["dtype", "torch_dtype"]  # 5 and 4 read these
    raw |= dict.fromkeys(named, dtype)
    for key, inner in raw.items():
        if isinstance(inner, dict) and key != "quantization_config":
            _set_nested(inner, dtype)


def _set_nested(raw: dict[str, Any], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if isinstance(raw.get(key), str):
            raw[key] = dtype
    for inner in raw.values():
        if isinstance(inner, dict):
            _set_nested(inner, dtype)


def _without_dtype(settings: Mapping[str, Any]) -> dict[str, Any]:
    ignored = ("dtype", "torch_dtype", "_name_or_path", "transformers_version")
    return {
        key: _without_dtype(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in ignored
    }
