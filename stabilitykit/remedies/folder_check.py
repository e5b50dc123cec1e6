"""A written folder, loaded again by plain transformers and compared with the original, number by number."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.errors import CheckpointError
from stabilitykit.models.transformers.plain import load_plain, read_settings
from stabilitykit.records.repaired_folder import Comparison, Float16, FolderCheck, Kept
from stabilitykit.records.scaling import Scaling
from stabilitykit.remedies.answers import ATTENTIONS, answers, plain_answers
from stabilitykit.remedies.folder import write_scaled
from stabilitykit.remedies.streamed import Opened, open_scaled
from stabilitykit.run.case import Progress
from stabilitykit.scaling.apply import rounded, with_settings

_KEPT = 16  # values of each output that repair.json keeps
_NEAR = 1e-3  # of the largest of them: kernels of another processor sum in another order


def check_folder(
    source: Path,
    folder: Path,
    scaling: Scaling,
    prompts: Sequence[Sequence[int]],
    dtype: str = "float16",
    *,
    kind: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FolderCheck:
    """Compares `folder`, of weights in `dtype`, with the model in `source`, on `prompts` of token ids.

    Compared are, bit for bit: every weight of the folder, as plain transformers loads it in `dtype`, with the
    original's, scaled and rounded once; and what the scaled model makes of the prompts in float32 with what the
    original does. A folder of float32 weights is that scaled model; for one of float16 weights it is the original,
    scaled in memory. Quantised weights are compared in what is computed with them: by the original and the scaled
    folder, each written once more, for as long as that takes, with everything that is not quantised in float32. Then
    the folder runs in float16. One model is in memory at a time, and streamed if it is large, as `open_scaled` says.
    `progress` is called with what is being done, how many steps are, and out of how many.
    """
    given: dict[str, Any] = {"kind": kind, "trust_remote_code": trust_remote_code}
    settings = read_settings(source, trust_remote_code=trust_remote_code)
    if not settings.get("quantization_config"):
        wide = folder if dtype == "float32" else None
        scaled_settings = with_settings(settings, scaling.settings)
        return _checked(source, folder, wide, scaling, scaled_settings, prompts, dtype, given, progress)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        twins = Path(place) / "original", Path(place) / "scaled"
        for twin, own in zip(twins, (Scaling(), scaling), strict=True):
            twin.mkdir()
            write_scaled(source, own, twin, "float32", **given)
        return _checked(twins[0], folder, twins[1], scaling, None, prompts, dtype, given, progress)


def _checked(
    original: Path,
    folder: Path,
    wide: Path | None,
    scaling: Scaling,
    settings: Mapping[str, Any] | None,
    prompts: Sequence[Sequence[int]],
    dtype: str,
    given: Mapping[str, Any],
    progress: Progress | None,
) -> FolderCheck:
    """`wide` is the scaled model in float32, if there is such a folder; `settings` are its own where its weights can be
    made in memory.
    """
    steps = _Steps(progress, 4)
    steps.begin("the original in float32")
    opened = open_scaled(original, **given)
    wanted = dict(_answers(opened, prompts))
    plain = list(plain_answers(opened.module, prompts))
    gains = _gains_rounded(opened, scaling)
    del opened

    steps.begin("the scaled model in float32")
    comparisons = []
    if settings is not None:
        low = Opened(module=load_plain(folder, getattr(torch, dtype), **given))
        dtypes = {name: tensor.dtype for name, tensor in low.module.state_dict().items()}
        written = _digests(low, {})
        del low
        opened = open_scaled(original, scaling.parameters, settings, **given)
        comparisons.append(_weights(written, _digests(opened, dtypes)))
        if wide is not None:
            del opened  # not two at a time
    if wide is not None:
        opened = open_scaled(wide, **given)
    with _Reached(opened.module, scaling) as reached:
        comparisons += [_compared(what, got, wanted.pop(what)) for what, got in _answers(opened, prompts)]
    del opened

    steps.begin("the folder in float16")
    half = _half(open_scaled(folder, dtype=torch.float16, **given), prompts, plain)

    steps.begin("the folder undone in float32")
    opened = _undone(folder, scaling, dtype, given)
    kept = tuple(_kept(what, got) for what, got in answers(opened.module, prompts, generating=()))
    return FolderCheck(
        prompts=tuple(map(tuple, prompts)),
        comparisons=tuple(comparisons),
        float16=half,
        gains_rounded=gains,
        kept=kept,
        not_run=reached.missed,
    )


def check_alone(
    folder: Path,
    scaling: Scaling,
    before: FolderCheck,
    dtype: str = "float16",
    *,
    kind: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FolderCheck:
    """As `check_folder`, without the original: with the folder's own weights, their scaling undone in memory.

    In float32, or with quantised weights in `dtype`, the folder must answer the prompts of `before` as it does undone,
    bit for bit, and that must be what `before` kept, within a thousandth of the largest value: other processors round
    differently.
    """
    given: dict[str, Any] = {"kind": kind, "trust_remote_code": trust_remote_code}
    steps = _Steps(progress, 3)
    steps.begin("the folder undone in float32")
    opened = _undone(folder, scaling, dtype, given)
    wanted = dict(_answers(opened, before.prompts))
    plain = list(plain_answers(opened.module, before.prompts))
    gains = _gains_rounded(opened, scaling)
    kept = tuple(_kept(what, got) for what, got in wanted.items())
    comparisons = list(_as_kept(before.kept, wanted))
    del opened

    steps.begin("the folder in float32")
    opened = _as_it_is(folder, dtype, given)
    with _Reached(opened.module, scaling) as reached:
        comparisons += [_compared(what, got, wanted.pop(what)) for what, got in _answers(opened, before.prompts)]
    del opened

    steps.begin("the folder in float16")
    half = _half(open_scaled(folder, dtype=torch.float16, **given), before.prompts, plain)
    return FolderCheck(
        prompts=before.prompts,
        comparisons=tuple(comparisons),
        float16=half,
        gains_rounded=max(gains, before.gains_rounded),
        kept=kept,
        not_run=reached.missed,
        original_seen=False,
    )


def _answers(opened: Opened, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """With both attentions; of a model that is streamed, each of whose runs reads all weights, tokens with one."""
    return answers(opened.module, prompts, generating=ATTENTIONS[:1] if opened.weights else ATTENTIONS)


def _undone(folder: Path, scaling: Scaling, dtype: str, given: Mapping[str, Any]) -> Opened:
    """The model of a folder of `dtype` in float32, with `scaling` taken back from its weights and settings.

    One that has quantised weights is returned as it is.
    """
    settings = read_settings(folder, trust_remote_code=given["trust_remote_code"])
    if settings.get("quantization_config"):
        return _as_it_is(folder, dtype, given)
    back = scaling.inverse
    return open_scaled(folder, back.parameters, with_settings(settings, back.settings), **given)


def _as_it_is(folder: Path, dtype: str, given: Mapping[str, Any]) -> Opened:
    """In float32; with quantised weights in `dtype`, as transformers loads what is beside them in no other."""
    if read_settings(folder, trust_remote_code=given["trust_remote_code"]).get("quantization_config"):
        return Opened(module=load_plain(folder, getattr(torch, dtype), **given))
    return open_scaled(folder, **given)


def _half(opened: Opened, prompts: Sequence[Sequence[int]], wanted: Sequence[Tensor]) -> Float16:
    try:
        got = list(plain_answers(opened.module, prompts))
    except CheckpointError as error:
        return Float16(finite=False, failure=str(error))
    if not all(bool(one.isfinite().all()) for one in got):
        return Float16(finite=False)
    return Float16(finite=True, error=max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)))


def _gains_rounded(opened: Opened, scaling: Scaling) -> int:
    return sum(rounded(opened.value(name), factor) for name, factor in scaling.parameters.items() if factor.added)


def _digests(opened: Opened, dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """Of each parameter and persistent buffer, once it is cast to its dtype."""
    return {name: _digest(one, dtypes.get(name, one.dtype)) for name, one in opened.values()}


def _digest(tensor: Tensor, dtype: torch.dtype = torch.float32) -> str:
    digest = hashlib.sha256()
    for piece in read_once(tensor.detach()):
        digest.update(piece.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(written: Mapping[str, str], wanted: Mapping[str, str]) -> Comparison:
    names = written.keys() | wanted.keys()
    wrong = [name for name in sorted(names) if written.get(name) != wanted.get(name)]
    told = f"weights ({', '.join(wrong[:3])})" if wrong else "weights"
    return Comparison(what=told, numbers=len(names), different=len(wrong), largest=float("nan") if wrong else 0.0)


def _compared(what: str, got: Tensor, wanted: Tensor) -> Comparison:
    different = int((got != wanted).sum())
    largest = float((got - wanted).abs().max()) if different else 0.0
    return Comparison(what=what, numbers=wanted.numel(), different=different, largest=largest, excused=True)


def _kept(what: str, outputs: Tensor) -> Kept:
    """The largest values, which a change of anything would show in."""
    places = outputs.abs().topk(min(_KEPT, outputs.numel())).indices.sort().values
    return Kept(
        what=what,
        sha256=_digest(outputs),
        places=tuple(places.tolist()),
        values=tuple(outputs[places].tolist()),
    )


def _as_kept(kept: Iterable[Kept], now: Mapping[str, Tensor]) -> Iterator[Comparison]:
    for one in kept:
        what = f"{one.what}, against what was kept"
        if one.what not in now or (one.places and max(one.places) >= now[one.what].numel()):
            yield Comparison(what=what, numbers=len(one.values), different=len(one.values), largest=float("nan"))
            continue
        if _digest(now[one.what]) == one.sha256:
            yield Comparison(what=what, numbers=now[one.what].numel(), different=0, largest=0.0)
            continue
        values = torch.tensor(one.values)
        away = (now[one.what][list(one.places)] - values).abs()
        far = ~(away <= _NEAR * values.abs().max())
        yield Comparison(what=what, numbers=len(one.values), different=int(far.sum()), largest=float(away.max()))


class _Reached:
    """Which of the scaled parameters are of modules that ran."""

    def __init__(self, model: nn.Module, scaling: Scaling) -> None:
        self._left = set(scaling.parameters)
        self._handles = []
        for path, module in model.named_modules():
            own = {f"{path}.{leaf}" if path else leaf for leaf in (*module._parameters, *module._buffers)}
            if own & self._left:
                self._handles.append(module.register_forward_pre_hook(self._saw(own)))

    def _saw(self, own: set[str]) -> Any:
        def saw(module: nn.Module, args: Any) -> None:
            self._left -= own

        return saw

    def __enter__(self) -> "_Reached":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def missed(self) -> tuple[str, ...]:
        return tuple(sorted(self._left))


class _Steps:
    def __init__(self, progress: Progress | None, count: int) -> None:
        self._progress, self._count, self._done = progress, count, 0

    def begin(self, what: str) -> None:
        if self._progress is not None:
            self._progress(f"checking {what}", self._done, self._count)
        self._done += 1
