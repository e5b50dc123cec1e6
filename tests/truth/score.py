"""How well a diagnosis agrees with what is known of a planted fault."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import stabilitykit as sk
from stabilitykit.diagnosis import document
from truth.row import Expected, Origin, Planted, Row

Score = Literal["exact", "acceptable", "misleading", "wrong", "raised"]
SCORES: tuple[Score, ...] = ("exact", "acceptable", "misleading", "wrong", "raised")
LEVELS = ("operators", "modules", "layers")

_WRAPPERS = re.compile(r"^(base_model\.(model\.)?)?(model\.)?")  # a site's path leaves these out
_TELLS_FINITE = re.compile(r"finite throughout(?!.*cannot be excluded)", re.IGNORECASE | re.DOTALL)
_BLAMES_INPUT = r"check what (is|was) passed"
_BLAMES_SETTING = r"temperature (is )?None|top_p (= )?None|top_k (= )?None"
_RESIDUAL = r"(?<!not )scale the residual"
_WIDER = r"use a (number )?format with a wider range|\(bfloat16, float32\)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`expected` and `said` are what was looked for and what was found; `why` names the columns that differ."""

    key: str
    root: int
    family: str
    level: str
    score: Score
    kind: str
    why: tuple[str, ...]
    expected: str
    said: str


@dataclass(frozen=True, slots=True)
class Bare:
    """A run without a recorder: what it returned or raised, and the modules that gave out what is not finite."""

    result: Any
    error: str | None
    lost: tuple[str, ...]


def judge(row: Row, level: str) -> Judgement:
    """Builds the fault, shows that it is there, records it, and compares what is said with what is known."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planted = row.make()
        bare = _bare(planted)
        _show(row, planted, bare)
        said, raised, same = _recorded(planted, level, bare)
    expected = planted.expected
    if raised is not None:
        score, why = "raised", [raised]
    elif expected is None:
        score, why = _of_control(said)
    elif level == "operators":
        score, why = operators_score(expected, said)
    else:
        score, why = _of_modules(expected, said, bare)
    if not same and raised is None:
        score, why = "wrong", [*why, "the recorded run computed other values"]
    return Judgement(
        key=row.key,
        root=row.root,
        family=row.family,
        level=level,
        score=score,  # type: ignore[arg-type]
        kind="control" if expected is None else "|".join(expected.kinds),
        why=tuple(why),
        expected=_told(expected),
        said=_shown(said),
    )


def _bare(planted: Planted) -> Bare:
    lost: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not finite(output):
                lost.append(name)

        return hook

    hooks = [
        module.register_forward_hook(look(_WRAPPERS.sub("", f"{name}.").removesuffix(".")))
        for name, module in planted.model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    result, error = _result(planted)
    for hook in hooks:
        hook.remove()
    return Bare(result, error, tuple(dict.fromkeys(lost)))


def _result(planted: Planted) -> tuple[Any, str | None]:
    torch.manual_seed(1)
    mode: AbstractContextManager[Any] = nullcontext() if planted.grad else torch.inference_mode()
    try:
        with mode:
            return planted.run(planted.model), None
    except (RuntimeError, ValueError) as error:
        return None, _named(error)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


def finite(values: Any) -> bool:
    """Whether every floating tensor in this holds only finite numbers."""
    leaves = [
        leaf
        for leaf in tree_leaves(_plain(values))
        if isinstance(leaf, Tensor) and not leaf.is_nested and leaf.is_floating_point()
    ]
    return all(bool((leaf.float() if leaf.element_size() == 1 else leaf).isfinite().all()) for leaf in leaves)


def _plain(values: Any) -> Any:
    return dict(values) if hasattr(values, "keys") else values


def _show(row: Row, planted: Planted, bare: Bare) -> None:
    """The fault is there: shown by the bare run alone."""
    assert planted.raises or bare.error is None, f"{row.key}: the bare run raised {bare.error}"
    if planted.symptom is not None:
        planted.symptom(bare.result)
    expected = planted.expected
    if expected is None or expected.outcome == "absorbed":
        assert bare.error is None, f"{row.key}: the bare run raised {bare.error}"
        assert finite(bare.result), f"{row.key}: the result of the bare run is not finite"
    elif expected.outcome == "reached":
        assert bare.error is not None or not finite(bare.result), f"{row.key}: the bare run's result is finite"


def _recorded(planted: Planted, level: str, bare: Bare) -> tuple[dict[str, Any] | None, str | None, bool]:
    """What the kit says, what it raised, and whether the run computed the same with it as without."""
    torch.manual_seed(1)
    mode: AbstractContextManager[Any] = nullcontext() if planted.grad else torch.inference_mode()
    result: Any = None
    try:
        with mode, sk.record(planted.model, level=level, **planted.record) as recording:  # type: ignore[arg-type]
            result = planted.run(planted.model)
    except (RuntimeError, ValueError) as error:
        if bare.error is None:
            return None, _named(error), False
        if _named(error) != bare.error:
            return None, f"{_named(error)}, where the bare run raised {bare.error}", False
    except Exception as error:  # a crash of the recorder's own
        return None, _named(error), False
    try:
        said: dict[str, Any] = json.loads(json.dumps(document(recording)))
    except Exception as error:
        return None, _named(error), False
    return said, None, _equal(result, bare.result)


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(_plain(one)), tree_leaves(_plain(other)), strict=True)
    return all(
        torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))
        if a.numel() and not _nan(a)
        else torch.equal(a.nan_to_num(3.0), b.nan_to_num(3.0))
        for a, b in pairs
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not a.is_nested and a.ndim
    )


def _nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isnan().any())


def _of_control(said: dict[str, Any] | None) -> tuple[Score, list[str]]:
    assert said is not None
    if said["first_break"] is not None or said["cause"] is not None:
        return "wrong", ["alarm, and nothing is wrong"]
    if said.get("outcome", "none") != "none":
        return "wrong", ["an outcome, and nothing is wrong"]
    return "exact", []


def matches(pattern: str, site: str) -> bool:
    return fnmatchcase(site, pattern.replace("[", "[[]"))


def operators_score(expected: Expected, said: dict[str, Any] | None) -> tuple[Score, list[str]]:
    assert said is not None
    first, verdict = said["first_break"], said["verdict"]
    if not expected.sites:
        missing = [f"without {word!r}" for word in expected.says if not re.search(word, verdict, re.IGNORECASE)]
        return ("wrong", missing) if missing else ("exact", [])
    if first is None:
        return "wrong", ["nothing said to have broken"]
    if not any(matches(pattern, first["site"]) for pattern in expected.sites):
        return "wrong", [f"site {first['site']}"]
    false: list[str] = []
    unsaid: list[str] = []
    for name, right, found in _columns(expected, first):
        if right:
            continue
        if found is not None:
            false.append(f"{name} {found}")
        elif name not in expected.unsure:
            unsaid.append(name)
    false += [
        f"says {word!r}" for word in forbidden(expected, said["dtype"]) if re.search(word, verdict, re.IGNORECASE)
    ]
    false += [f"says {sum_}, which is false" for sum_ in false_sums(verdict)]
    unsaid += [f"without {word!r}" for word in expected.says if not re.search(word, verdict, re.IGNORECASE)]
    if false:
        return "misleading", [*false, *unsaid]
    return ("acceptable", unsaid) if unsaid else ("exact", [])


def _columns(expected: Expected, first: dict[str, Any]) -> Iterator[tuple[str, bool, Any]]:
    """Each column that is compared: its name, whether it is right, and what was said; None for nothing said."""
    if expected.kinds:
        yield "kind", first["kind"] in expected.kinds, first["kind"]
    if expected.operators:
        yield "operator", first["operator"] in expected.operators, first["operator"]
    for name in ("row", "position", "step", "channel"):
        wanted = getattr(expected, name)
        if wanted is not None:
            yield name, first[name] == wanted, first[name]
    if expected.token is not None:
        yield "token", first["token_id"] == expected.token, first["token_id"]
    for name in ("rows", "positions"):
        wanted = getattr(expected, name)
        if wanted:
            found = first.get(name) or None
            yield name, found == list(wanted) or (len(wanted) == 1 and not found), found
    if expected.value is not None:
        value = first["value"]
        number = None if value is None else float(value)
        yield "value", number is not None and close(number, expected.value), value
    if expected.scaled is not None:
        value = first.get("scaled")
        yield "scaled", value is not None and close(float(value), expected.scaled, 0.05), value
    if expected.origin is not None:
        yield from _origin(expected.origin, first.get("origin") or {})
    rounded = first.get("rounded") or {}
    if expected.rounded:
        site = rounded.get("site")
        yield "rounded", site is not None and any(matches(one, site) for one in expected.rounded), site
    if expected.rounded_from is not None:
        value = rounded.get("from")
        yield "rounded from", value is not None and close(float(value), expected.rounded_from, 0.1), value
    if expected.no_rounding:
        yield "no rounding", not rounded, rounded or False
    if expected.label is not None and first["label"] is not None:
        yield "label", re.search(expected.label, first["label"], re.IGNORECASE) is not None, first["label"]
    if expected.absorbed_by:
        yield "absorbed by", first.get("absorbed_by") in expected.absorbed_by, first.get("absorbed_by")
    if expected.outcome is not None:
        yield "outcome", first.get("outcome") == expected.outcome, first.get("outcome")
    if expected.harmless is not None:
        found = first.get("harmless")
        yield "harmless", found == expected.harmless or (found is None and not expected.harmless), found


_NUMBER = r"(-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)"
_SUM = re.compile(rf"(?<![+·÷×*/-] ){_NUMBER} ([+·÷×*/-]) {_NUMBER} = {_NUMBER}")


def false_sums(text: str) -> list[str]:
    """Of the sums that are printed, `60,000 + 8,000 = 68,000`, those that do not hold to the digits that are shown."""
    found = []
    for match in _SUM.finditer(text):
        left, right, result = (float(match[i].replace(",", "")) for i in (1, 3, 4))
        made = {"+": left + right, "-": left - right}.get(match[2])
        if made is None:
            made = left * right if match[2] in "·×*" else left / right if right else math.inf
        if abs(made - result) > 0.01 * max(abs(left), abs(right), abs(made)) and not math.isinf(made):
            found.append(match[0])
    return found


def _origin(wanted: Origin, found: dict[str, Any]) -> Iterator[tuple[str, bool, Any]]:
    kind, name, whether = found.get("kind"), found.get("name"), found.get("finite")
    if wanted.kinds:
        yield "origin", kind in wanted.kinds, kind
    if wanted.names:
        yield "origin's name", name is not None and any(matches(one, name) for one in wanted.names), name
    if wanted.finite is not None:
        yield "origin finite", whether == wanted.finite, whether


def close(value: float, wanted: float, within: float = 0.02) -> bool:
    if math.isnan(wanted) or math.isinf(wanted):
        return value == wanted or (math.isnan(wanted) and math.isnan(value))
    return math.isclose(value, wanted, rel_tol=within)


def forbidden(expected: Expected, dtype: str) -> list[str]:
    """What may not be said of this fault: of the row's own, and what misleads wherever it is said of such a one."""
    never = [*expected.never, _BLAMES_SETTING]
    if "input" not in expected.kinds:
        never.append(_BLAMES_INPUT)
    if not expected.residual:
        never.append(_RESIDUAL)
    ranged = {"overflow", "reduction", "weight"} & set(expected.kinds)
    if not expected.wider and (dtype in ("float32", "float64") or not ranged):
        never.append(_WIDER)
    return never


def _of_modules(expected: Expected, said: dict[str, Any] | None, bare: Bare) -> tuple[Score, list[str]]:
    """At the levels that see no operators: a false claim is wrong, an honest "unresolved" is acceptable."""
    assert said is not None
    first, verdict = said["first_break"], said["verdict"]
    if expected.coarse:
        expected = expected.but(kinds=expected.coarse)
    never = [
        word for word in forbidden(expected, said["dtype"]) if not word.startswith("at ")
    ]  # elsewhere, it is right
    false = [f"says {word!r}" for word in never if re.search(word, verdict, re.IGNORECASE)]
    if first is None:
        if _TELLS_FINITE.search(verdict):
            false.append("finite throughout")
        return ("wrong", false) if false else ("acceptable", ["nothing seen"])
    site, kind = first["site"], first["kind"]
    whole = re.sub(r"\[\d+\]$", "", site)
    lost = set(bare.lost) | {"/output"}
    if whole not in lost and not any(matches(pattern, site) for pattern in expected.sites):
        false.append(f"site {site}, which is finite")
    if kind != "unresolved" and expected.kinds and kind not in expected.kinds:
        false.append(f"kind {kind}")
    for name in ("position", "row", "step"):
        wanted, found = getattr(expected, name), first[name]
        if wanted is not None and found is not None and found != wanted and name == "step":
            false.append(f"{name} {found}")
    if false:
        return "wrong", false
    return ("acceptable", ["unresolved"]) if kind == "unresolved" else ("exact", [])


def _told(expected: Expected | None) -> str:
    if expected is None:
        return "nothing"
    parts = [f"{' or '.join(expected.kinds)} at {' or '.join(expected.sites)}"]
    for name in ("operators", "origin", "row", "rows", "position", "positions", "step", "token", "value", "outcome"):
        value = getattr(expected, name)
        if value not in (None, ()):
            parts.append(f"{name} {value}")
    if expected.harmless is not None:
        parts.append("harmless" if expected.harmless else "not harmless")
    return ", ".join(parts)


def _shown(said: dict[str, Any] | None) -> str:
    if said is None:
        return ""
    first = said["first_break"]
    columns = (
        "" if first is None else json.dumps({k: v for k, v in first.items() if k not in ("operand_sites", "limit")})
    )
    return f"{said['verdict']} {columns}".strip()
