"""Proves from its weights alone that no prompt makes a decoder overflow float16, or says which tensor could.

    python -m stabilitykit.proof.check FOLDER

FOLDER is a Hugging Face folder of a Gemma 1, 2 or 3, a Llama or a Qwen3 in float16, with a proof.json:

    {"schema": 1, "dtype": "float16", "limit": 65504,
     "sha256": {"config.json": hex, "model.safetensors": hex, ...},    every file but the notes beside the model
     "bounds": {kind of tensor: largest magnitude, ...},               what the writer claims; none above the limit
     "digest": hex}    SHA-256 of all other keys as JSON: keys sorted, no spaces, ASCII, shortest floats

Nothing is taken from the code that makes such folders: the files say what the model is, and every inequality is here.
A setting that is not listed here, or not in its range, is refused: what is not checked might change the model.

What is assumed stands in ASSUMPTIONS. Rounding to float16 is by a factor within 2^-11 of 1 or, below 2^-14, by at most
2^-25; a float32 sum of n terms errs by n · 2^-24, hence the limit of 2^20 tokens. Whatever weight a key gets, a mean of
values stays one.

Rounding. An RMSNorm returns g ∘ n with |n| ≤ sqrt(d), d its channels, for any input: finite eps > 0 only shrinks n.
Float32 lets |n| grow by d · 2^-25 and rounding to float16 by 2^-11; what rounds below 2^-14 is less than 2^-13 in n
if no gain counts as smaller than 2^-12. So rounded outputs are exact ones of a ball 0.09% larger (d ≤ 8192), and
every bound below is taken over that ball. Llama and Qwen3 round n itself as well, by 2^-11 more: 0.14% (where it is
subnormal, by less than a channel's share of 2^-13). The longest way from there to a tensor is that to the scores:

    two balls 0.3%; the float32 sums of q and k, sqrt(D) · d · 2^-24 each (D ≤ 256): 1.6% at the very most,
    0.7% in any Gemma; RoPE, table, product and sum, sqrt(2) · 3 · 2^-11 each: 0.5%; q, k, q · k, its scaling and
    the three steps of a soft-cap 2^-11 each: 0.35%

and under 2.8% in all. The way to down_proj has two balls, gate, gelu, up, their product and the result: 0.6%. What is
relative to a sum of magnitudes rather than to the bound (sums of float32 whose terms cancel) is added where it
occurs. SLACK is 3%; with an absolute 1 for subnormal results it also covers this file's own float64.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

Array = NDArray[np.float64]  # E hidden channels, F feed-forward channels, D channels of a head

LIMIT = 65_504.0  # float16's largest finite number
SLACK = 1.03
HALF = 2.0**-11  # float16's unit roundoff
SINGLE = 2.0**-24  # float32's
GELU_DIP = 0.1701  # gelu in its tanh form is at least -0.17004, and at most max(x, 0)
SILU_DIP = 0.2785  # silu is at least -0.27847, and at most max(x, 0)
TINY = 1e-30

# The probabilities stored for one query: float32's sum in the denominator is short by a factor 1 - 2^-4 at most,
# each rounds by 2^-11 or, where subnormal, by 2^-25: 1.0667 · 1.0005 + 2^20 · 2^-25 < 1.1. Their products with
# values are summed in float32, each channel with its own error, below e^(1/16) - 1 < 0.065.
PROBABILITIES = 1.1
MIXING = 0.065

ASSUMPTIONS = (
    "Plain transformers, or what computes the same, runs the model for inference: no dropout, adapter or other code.",
    "Weights and the results of all operators are stored in float16, and results are rounded to it once.",
    "RMSNorm and softmax are computed in float32.",
    "Products of matrices are summed in float32, in any order. On CUDA this needs "
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False.",
    "Subnormal numbers are not flushed to zero.",
    "The tables of RoPE, probabilities and tanh are at most 1 as stored.",
    "A prompt with what is generated from it has at most 1,048,576 tokens, and no padding: every token sees a key.",
    "Scores to which a mask was added may be -inf; they are the one tensor that is not bounded.",
)


class _Absent:
    """What a key holds that is not there."""

    def __repr__(self) -> str:
        return "missing"


_ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a key may hold: `says` ends a sentence that begins "must be"."""

    says: str
    allows: Callable[[Any], bool]

    def optional(self) -> "_Rule":
        return _Rule(self.says, lambda value: value is _ABSENT or self.allows(value))

    def or_null(self) -> "_Rule":
        return _Rule(f"{self.says}, or null", lambda value: value is None or self.allows(value))


_Rules = dict[str, "_Rule | _Rules"]  # of an object, key by key; an object in it may be left out, or null


def _number(least: float, most: float) -> _Rule:
    return _Rule(
        f"a number from {least:.4g} to {most:.4g}", lambda value: type(value) in (int, float) and least <= value <= most
    )


def _whole(least: int, most: int) -> _Rule:
    return _Rule(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def _one_of(*values: str | bool | float) -> _Rule:
    said = " or ".join(json.dumps(value) for value in values)
    return _Rule(said, lambda value: any(type(value) is type(one) and value == one for one in values))


def _each(rule: _Rule, length: int | None = None) -> _Rule:
    def allows(value: Any) -> bool:
        return type(value) is list and length in (None, len(value)) and all(map(rule.allows, value))

    return _Rule(f"a list{'' if length is None else f' of {length}'}, each {rule.says}", allows)


def _objections(file: str, found: dict[str, Any], rules: _Rules, path: str = "") -> Iterator[str]:
    """A sentence for each key that `rules` do not know, and for each value that they do not allow."""
    for key in sorted(found.keys() - rules.keys()):
        yield (
            f"{path}{key} in {file} is {_shown(found[key])}, and its effect on the proof is unknown: it must be left "
            f"out, as only {', '.join(sorted(rules))} may be there."
        )
    for key, rule in rules.items():
        value = found.get(key, _ABSENT)
        if isinstance(rule, _Rule):
            if not rule.allows(value):
                yield f"{path}{key} in {file} is {_shown(value)}, and must be {rule.says}."
        elif isinstance(value, dict):
            yield from _objections(file, value, rule, f"{path}{key}.")
            if "linear" in (value.get("rope_type"), value.get("type")) and "factor" not in value:
                yield f"{path}{key}.factor in {file} is missing, and must be a number where the rope type is linear."
        elif value is not None and value is not _ABSENT:
            yield f"{path}{key} in {file} is {_shown(value)}, and must be an object or null."


def _shown(value: Any) -> str:
    said = repr(value) if value is _ABSENT else json.dumps(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


# A larger size would need more rounding than is allowed for.
_SIZES: _Rules = {
    "hidden_size": _whole(1, 8192), "intermediate_size": _whole(1, 2**17), "num_attention_heads": _whole(1, 256),
    "num_key_value_heads": _whole(1, 256), "head_dim": _whole(1, 256), "num_hidden_layers": _whole(1, 256),
    "vocab_size": _whole(1, 2**24),
}  # fmt: skip
_ID = _whole(0, 2**24)
_IDS: _Rules = {
    f"{name}_token_id": _Rule(
        f"{_ID.says}, a list of such, or null",
        lambda value: value in (None, _ABSENT) or _ID.allows(value) or _each(_ID).allows(value),
    )
    for name in ("bos", "eos", "pad")
}
_VERSION = _Rule("text", lambda value: isinstance(value, str)).optional()
# With frequencies theta^-(2i/D) / factor from 2^-60 to 1, every angle of 2^20 tokens is finite, and cos and sin are at
# most 1. Other types of RoPE scale the tables, or make them in ways that are not examined here.
_THETA = _number(1, 2.0**40).optional()
_KIND = _one_of("default", "linear").optional()
_ROPE: _Rules = {"rope_theta": _THETA, "rope_type": _KIND, "type": _KIND, "factor": _number(1, 2.0**20).optional()}
_CAP = _number(2.0**-10, LIMIT).or_null()


@dataclass(frozen=True, slots=True)
class _Family:
    """What layers of a model type do; `generation` is Gemma's, 0 for others, `dip` how negative the gate becomes."""

    architecture: str
    generation: int = 0
    query_key_norm: bool = False
    dip: float = SILU_DIP

    @property
    def post_norms(self) -> bool:
        return self.generation > 1


_TYPES = {
    "gemma": _Family("GemmaForCausalLM", 1, dip=GELU_DIP),
    "gemma2": _Family("Gemma2ForCausalLM", 2, dip=GELU_DIP),
    "gemma3_text": _Family("Gemma3ForCausalLM", 3, query_key_norm=True, dip=GELU_DIP),
    "llama": _Family("LlamaForCausalLM"),
    "qwen3": _Family("Qwen3ForCausalLM", query_key_norm=True),
}


def _settings(config: dict[str, Any], family: _Family) -> _Rules:
    """The rules for this config.json, whose number of layers a list of theirs must match."""
    layers, generation = config.get("num_hidden_layers"), family.generation
    rules = _SIZES | _IDS | {
        "model_type": _one_of(*_TYPES),
        "architectures": _each(_one_of(family.architecture), 1).optional(),
        "dtype": _one_of("float16").optional(),
        "torch_dtype": _one_of("float16").optional(),
        "max_position_embeddings": _whole(1, 2**20).optional(),
        "rms_norm_eps": _number(2.0**-80, 2.0**32),
        "attention_bias": _one_of(False),
        "attention_dropout": _one_of(0.0, 0).optional(),
        "rope_theta": _THETA,
        "rope_scaling": _ROPE,
        "rope_parameters": _ROPE if generation != 3 else {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "initializer_range": _number(0, 2.0**10).optional(),
        "use_cache": _one_of(True, False).optional(),
        "transformers_version": _VERSION,
    }  # fmt: skip
    if generation == 0:
        rules |= {"hidden_act": _one_of("silu"), "tie_word_embeddings": _one_of(True, False)}
        if family.query_key_norm:  # Qwen3; its window is read only where it is used
            return rules | {
                "use_sliding_window": _one_of(False).optional(),
                "sliding_window": _whole(1, 2**20).or_null().optional(),
                "max_window_layers": _whole(0, 2**20).optional(),
                "layer_types": _each(_one_of("full_attention"), layers).or_null().optional(),
            }
        return rules | {"mlp_bias": _one_of(False).optional(), "pretraining_tp": _one_of(1).optional()}
    rules |= {
        "hidden_activation": _one_of("gelu_pytorch_tanh"),
        "hidden_act": _one_of("gelu_pytorch_tanh").optional(),
        "tie_word_embeddings": _one_of(True),
    }
    if generation > 1:
        window, kinds = _whole(1, 2**20), _each(_one_of("full_attention", "sliding_attention"), layers)
        slides = config.get("layer_types") != ["full_attention"] * (layers if type(layers) is int else 0)
        rules |= {
            "query_pre_attn_scalar": _number(2.0**-20, 2.0**20),
            "sliding_window": (window if slides else window.or_null()).optional(),
            "layer_types": kinds.or_null().optional(),
            "attn_logit_softcapping": _CAP,
            "final_logit_softcapping": _CAP,
        }
    if generation > 2:
        rules |= {"rope_local_base_freq": _THETA, "sliding_window_pattern": _whole(1, 2**20).optional()}
    return rules


# What is drawn from the logits is no tensor of the model, but what divides them must not be close to zero.
_GENERATION: _Rules = _IDS | {
    "do_sample": _one_of(True, False).optional(),
    "temperature": _number(2.0**-10, 2.0**10).or_null().optional(),
    "top_k": _whole(0, 2**24).or_null().optional(),
    "top_p": _number(2.0**-20, 1).or_null().optional(),
    "min_p": _number(0, 1).or_null().optional(),
    "repetition_penalty": _number(2.0**-4, 2.0**4).or_null().optional(),
    "max_length": _whole(1, 2**20).or_null().optional(),
    "max_new_tokens": _whole(1, 2**20).or_null().optional(),
    "cache_implementation": _one_of("dynamic", "static", "hybrid").or_null().optional(),
    **dict.fromkeys(
        ("use_cache", "output_attentions", "output_hidden_states", "_from_model_config"),
        _one_of(True, False).optional(),
    ),
    "transformers_version": _VERSION,
}


class _RefusedError(Exception):
    """A folder that cannot be examined; `args` are sentences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """`problems` are sentences, none where the folder is proved. `bounds` are this file's own, by kind of tensor.

    `assumptions` are sentences too: what the proof takes for granted. A bound is a magnitude, the largest of all layers
    and channels; it holds whether or not it is within float16.
    `rows` counts the bounds on channels of down_proj that the screen left open, and Cholesky was asked about.
    """

    problems: tuple[str, ...]
    bounds: dict[str, float]
    rows: int
    assumptions: tuple[str, ...] = ASSUMPTIONS


def check(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> Checked:
    """Whether the Gemma in `folder` is the one its proof.json describes, and proved. Raises nothing for what is in it.

    `progress` is called with the layers that are done and those in all.
    """
    proof, problems = _Proof(), list[str]()
    examinations: tuple[Callable[[], list[str]], ...] = (
        lambda: _unlike_its_proof(folder),
        lambda: proof.run(_Model(folder), progress),
    )
    for examine in examinations:
        try:
            problems += examine()
        except _RefusedError as refused:
            problems += refused.args
        except (OSError, SafetensorError) as error:
            problems.append(f"{folder} cannot be read: {error}.")
    return Checked(problems=tuple(dict.fromkeys(problems)), bounds=proof.bounds, rows=proof.rows)


def _unlike_its_proof(folder: Path) -> list[str]:
    claimed, problems = _json(folder / "proof.json"), []
    rest = {key: claimed[key] for key in claimed if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    if claimed.get("digest") != hashlib.sha256(canonical.encode()).hexdigest():
        problems.append("proof.json was changed after it was written: its digest does not match.")
    hashes, bounds = claimed.get("sha256"), claimed.get("bounds")
    kind = (claimed.get("schema"), claimed.get("dtype"), claimed.get("limit"))
    if kind != (1, "float16", LIMIT) or not (isinstance(hashes, dict) and isinstance(bounds, dict) and bounds):
        return [*problems, "proof.json must have schema 1, dtype float16, limit 65504, sha256 and bounds."]
    files = _files(folder)
    problems += [
        f"{name} is in the folder, and proof.json has no SHA-256 of it." for name in sorted(files - set(hashes))
    ]
    problems += [f"proof.json has a SHA-256 of {name}, which the folder lacks." for name in sorted(set(hashes) - files)]
    for name in sorted(files & set(hashes)):
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != hashes[name]:
                problems.append(f"{name} has changed since the proof was written: its SHA-256 does not match.")
    for kind, bound in bounds.items():
        if type(bound) not in (int, float) or not 0 <= bound <= LIMIT:
            problems.append(f"proof.json claims {bound} for {kind}, which is not a number from 0 to 65,504.")
    return problems


def _files(folder: Path) -> set[str]:
    """All files at any depth, but for the proof, what is said about the model in README.md and repair.json, and names
    that begin with a dot: whatever a loader, now or later, makes of the others is covered."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    hidden = {path for path in paths if any(part.startswith(".") for part in path.parts)}
    return {path.as_posix() for path in paths if path not in hidden} - {"proof.json", "README.md", "repair.json"}


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _RefusedError(f"{path.name} cannot be read: {error}.") from error
    if not isinstance(read, dict):
        raise _RefusedError(f"{path.name} must hold a JSON object.")
    return read


def _foreign(folder: Path) -> Iterator[str]:
    """Sentences on what beside config.json and the weights would make the model, or what is drawn from it, another."""
    for name in sorted(_files(folder)):
        if name == "adapter_config.json" or name.endswith(".py"):
            yield f"{name} would change the model, and must not be in the folder."
    if (folder / "generation_config.json").exists():
        yield from _objections("generation_config.json", _json(folder / "generation_config.json"), _GENERATION)


class _Model:
    """A folder's sizes and tensors; refused where anything in it could make the model another than is assumed here."""

    def __init__(self, folder: Path) -> None:
        config = self.config = _json(folder / "config.json")
        name, kinds = config.get("model_type"), ", ".join(_TYPES)
        if type(name) is not str or name not in _TYPES:
            raise _RefusedError(f"model_type in config.json is {_shown(name)}, and must be one of {kinds}.")
        self.family = _TYPES[name]
        refused = [*_objections("config.json", config, _settings(config, self.family)), *_foreign(folder)]
        if refused:
            raise _RefusedError(*refused)
        self.hidden, self.inner, self.heads, self.kv_heads, self.head, self.layers, self.vocabulary = (
            int(config[key]) for key in _SIZES
        )
        if self.head % 2 or self.heads % self.kv_heads or self.heads * self.head > 8192:
            raise _RefusedError(
                f"head_dim, num_attention_heads and num_key_value_heads in config.json are {self.head}, {self.heads} "
                f"and {self.kv_heads}: the first must be even, the second a multiple of the third, and the product of "
                "the first two at most 8192."
            )
        self.scale = self.head**-0.5
        self.score_cap = self.logit_cap = math.inf
        self.tied = bool(config["tie_word_embeddings"])
        if self.family.generation > 1:
            self.scale = float(config["query_pre_attn_scalar"]) ** -0.5
            self.score_cap, self.logit_cap = (
                math.inf if config[f"{key}_logit_softcapping"] is None else float(config[f"{key}_logit_softcapping"])
                for key in ("attn", "final")
            )
        self._open(folder)

    def _open(self, folder: Path) -> None:
        self._slices: dict[str, Any] = {}
        where: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file: Any = safe_open(path, framework="np")
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise _RefusedError(f"{path.name} cannot be read: {error}.") from error
            if twice := sorted(set(found) & set(where)):
                raise _RefusedError(f"{twice[0]} is in {path.name} and in {where[twice[0]]}.")
            self._slices |= found
            where |= dict.fromkeys(found, path.name)
        index = folder / "model.safetensors.index.json"
        whole = set(where.values()) <= {"model.safetensors"}  # otherwise that file would hide the others
        if not whole and ((folder / "model.safetensors").exists() or _json(index).get("weight_map") != where):
            raise _RefusedError(f"{index.name} does not say in which file each tensor is.")
        self.unread = set(where)

    def read(self, name: str, *shape: int, start: int = 0, rows: int = 2**30) -> Array:
        """A matrix [out, in] or a vector, or at most `rows` of its rows from `start` on, in float64."""
        full = f"{'' if name == 'lm_head' else 'model.'}{name}.weight"
        stored = self._slices.get(full)
        if stored is None or stored.get_dtype() != "F16" or tuple(stored.get_shape()) != shape:
            raise _RefusedError(f"{full} must be in float16 and of shape {shape}, by the config.")
        self.unread.discard(full)
        read: Array = stored[start : min(start + rows, shape[0])].astype(np.float64)
        if not np.isfinite(read).all():
            raise _RefusedError(f"{full} holds weights that are not finite.")
        return read

    def pieces(self, name: str) -> Iterator[Array]:
        """The rows of a matrix with one for each token, some at a time."""
        for start in range(0, self.vocabulary, 2**14):
            yield self.read(name, self.vocabulary, self.hidden, start=start, rows=2**14)

    def gain(self, name: str, channels: int) -> Array:
        """A norm's, 1 + w in a Gemma and w in others, none smaller than 2^-12: see above, on rounding."""
        gain = (self.family.generation > 0) + self.read(name, channels)
        return np.copysign(np.maximum(np.abs(gain), 2.0**-12), gain)


class _Proof:
    """The bounds, from the embedding to the logits. Vectors are bounded channel by channel."""

    def __init__(self) -> None:
        self.bounds: dict[str, float] = {}
        self.over: dict[str, dict[str, None]] = {}  # by kind of tensor, where it is not proved
        self.rows = 0
        self.place = ""

    def hold(self, kind: str, exact: Array | float) -> Array:
        """From a bound on what a tensor is without rounding to one on what is stored, by channel; notes the largest."""
        return self.note(kind, SLACK * np.atleast_1d(np.asarray(exact, np.float64)) + 1)

    def note(self, kind: str, bound: Array) -> Array:
        """The same of a bound that has its slack."""
        worst = float(bound.max())
        self.bounds[kind] = max(self.bounds.get(kind, 0.0), worst)
        if not worst <= LIMIT:
            self.over.setdefault(kind, {})[self.place] = None
        return bound

    def run(self, model: _Model, progress: Callable[[int, int], None] | None) -> list[str]:
        """Bounds every tensor, in the order in which they arise; sentences on those that are not proved."""
        root, final = math.sqrt(model.hidden), model.gain("norm", model.hidden)
        largest, logit = np.zeros(model.hidden), 0.0
        for rows in model.pieces("embed_tokens"):
            largest = np.maximum(largest, np.abs(rows).max(0))
        for rows in model.pieces("embed_tokens" if model.tied else "lm_head"):
            logit = max(logit, root * float(norms(rows * final).max()))
        self.place = "the embedding"
        stream = self.hold("embed_tokens", (root if model.family.generation else 1.0) * largest)
        for layer in range(model.layers):
            self.place = f"layer {layer}"
            stream = self._layer(model, f"layers.{layer}.", stream)
            if progress is not None:
                progress(layer + 1, model.layers)
        self.place = "the head"
        self.hold("norm", root * np.abs(final))
        self.hold("lm_head", logit * max(1.0, 1 / model.logit_cap))
        if model.unread:
            raise _RefusedError(
                f"The config does not account for {min(model.unread)} and {len(model.unread) - 1} others."
            )
        return [
            f"{kind} may reach {self.bounds[kind]:,.0f}, above the float16 maximum, 65,504, in {', '.join(places)}."
            for kind, places in self.over.items()
        ]

    def _layer(self, model: _Model, prefix: str, stream: Array) -> Array:
        def normed(name: str) -> tuple[Array, Array]:
            gain = model.gain(prefix + name, model.hidden)
            return gain, self.hold(name, math.sqrt(model.hidden) * np.abs(gain))

        branch = self._attention(model, prefix + "self_attn.", normed("input_layernorm")[0])
        gain, bound = normed("post_attention_layernorm")  # without post-norms the norm before the MLP
        if model.family.post_norms:
            branch, gain = bound, normed("pre_feedforward_layernorm")[0]
        # A sum rounds by 2^-11; where it is subnormal, it is exact.
        stream = self.note("residual", (stream + branch) * (1 + HALF))
        branch = self._mlp(model, prefix + "mlp.", gain)
        if model.family.post_norms:
            branch = normed("post_feedforward_layernorm")[1]
        return self.note("residual", (stream + branch) * (1 + HALF))

    def _attention(self, model: _Model, prefix: str, gain: Array) -> Array:
        """The bound on o_proj's channels [E]."""
        root, d, half, groups = math.sqrt(model.hidden), model.head, model.head // 2, model.heads // model.kv_heads
        q, k, v = (
            (model.read(f"{prefix}{name}_proj", heads * d, model.hidden) * gain).reshape(heads, d, model.hidden)
            for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads))
        )
        q_rows, k_rows, v_rows = root * norms(q), root * norms(k), root * norms(v)  # [heads, D]
        larger = max(1.0, model.scale)  # some scale q before q · k
        if model.family.query_key_norm:
            self.hold("q_proj", q_rows)
            self.hold("k_proj", k_rows)
            # RoPE turns channels i and i + D/2 together, and a pair is at most its share of n times its larger gain.
            # The pairs' products sum to at most the largest product of two gains times |n| |m| <= D.
            q_gain, k_gain = (np.abs(model.gain(f"{prefix}{name}_norm", d)).reshape(2, half).max(0) for name in "qk")
            self.hold("q_norm", math.sqrt(d) * q_gain * larger)
            self.hold("k_norm", math.sqrt(d) * k_gain)
            scores = d * float((q_gain * k_gain).max())
        else:
            # A pair that turns puts at most its length into a channel.
            self.hold("q_proj", np.hypot(q_rows[:, :half], q_rows[:, half:]) * larger)
            self.hold("k_proj", np.hypot(k_rows[:, :half], k_rows[:, half:]))
            q_size, k_size = ([root * spectral_norm(head) + 2.0**-10 for head in heads] for heads in (q, k))
            scores = max(size * k_size[head // groups] for head, size in enumerate(q_size))
        self.hold("scores", scores * max(1.0, model.scale, model.scale / model.score_cap))
        value = self.hold("v_proj", v_rows)
        self.hold("attention", PROBABILITIES * (1 + MIXING) * value)

        # A head returns a mean of values, so that its share of a channel is at most its largest for one value. What
        # float32 and rounding do to single channels of v and of the mean does not cancel: 2 · 2^-11 and the sums.
        o = model.read(f"{prefix}o_proj", model.hidden, model.heads * d).reshape(model.hidden, model.heads, d)
        exact, magnitudes = np.zeros(model.hidden), np.zeros(model.hidden)
        for head in range(model.heads):
            exact += root * norms(o[:, head] @ v[head // groups])
            magnitudes += np.abs(o[:, head]) @ value[head // groups]
        lost = MIXING + 3 * HALF + (model.hidden + model.heads * d) * SINGLE
        return self.hold("o_proj", PROBABILITIES * (exact + lost * magnitudes))

    def _mlp(self, model: _Model, prefix: str, gain: Array) -> Array:
        """The bound on down_proj's channels [E]."""
        d = model.hidden
        a, b = (model.read(f"{prefix}{name}_proj", model.inner, d) * gain for name in ("gate", "up"))  # [F, E]
        w = model.read(f"{prefix}down_proj", d, model.inner)  # [E, F]
        gate, up = self.hold("gate_proj", math.sqrt(d) * norms(a)), self.hold("up_proj", math.sqrt(d) * norms(b))
        # Of one n: (a · n)(b · n) is largest halfway between a and b.
        product = d * (norms(a) * norms(b) + np.abs(np.einsum("fe,fe->f", a, b))) / 2
        self.hold("gate · up", np.maximum(product, model.family.dip * up))

        # With x = a · n, y = b · n: where x < 0, |gelu(x) y| <= dip |y|. Float32's errors of x and y are relative to
        # their bounds, d · 2^-24 each, and so is down_proj's own, F · 2^-24; so are roundings below 2^-14.
        dips = model.family.dip * math.sqrt(d) * np.minimum(np.abs(w) @ norms(b), norms(w) * spectral_norm(b))
        rest = dips + (3 * d + 2 * model.inner) * SINGLE * (np.abs(w) @ (gate * up))
        # Without post-norms what is returned is added up, layer by layer: a share of the limit is asked of each.
        share = LIMIT if model.family.post_norms else LIMIT / (2 * model.layers)
        sides = (SLACK * (d * screened + rest) + 1 for screened in screen(a, b, w))
        worst = np.zeros(d)
        for sign, bound in zip((1, -1), sides, strict=True):
            for row in np.argsort(-bound):
                if bound[row] <= share or worst.max() > LIMIT:  # a layer not proved: how far off it is would take long
                    break
                self.rows += 1
                enough = ((share - 1) / SLACK - rest[row]) / d
                bound[row] = min(bound[row], SLACK * (d * eigenvalue(a, b, sign * w[row], enough) + rest[row]) + 1)
                worst[row] = max(worst[row], bound[row])
            worst = np.maximum(worst, bound)
        return self.note("down_proj", worst)


# A channel of down_proj is the sum over j of w_j gelu(x_j) y_j, or silu, with x_j = a_j · n and y_j = b_j · n. Where
# x_j > 0, 0 <= gelu(x) <= x, and w x y <= |w| (s x + sign(w) y / s)² / 4 for every s > 0, as u v <= (u + v)² / 4.
# Those terms sum to at most |n|² times the largest eigenvalue of M = sum |w_j| c_j c_j', with
# c_j = (s_j a_j + sign(w_j) b_j / s_j) / 2: what the j with x_j < 0 put into M is not negative. The channel's smallest
# value is minus the largest for -w.


def balance(a: Array, b: Array) -> Array:
    """s [F, 1] that makes s |a| = |b| / s."""
    return np.sqrt((norms(b) + TINY) / (norms(a) + TINY))[:, None]


def screen(a: Array, b: Array, w: Array, block: int = 1024) -> Array:
    """Upper bounds [2, E] of the eigenvalues of all channels, for w and for -w: the Frobenius norms of M.

    Their squares are sums over j, k of |w_j| |w_k| (c_j · c_k)²: for all channels, one product of matrices.
    """
    s = balance(a, b)
    c = np.concatenate([s * a + b / s, s * a - b / s]) / 2  # [2F, E], for either sign of w
    positive, negative = np.maximum(w, 0), np.maximum(-w, 0)
    sides = np.concatenate([np.hstack([positive, negative]), np.hstack([negative, positive])])  # [2E, 2F]
    squares = np.zeros(len(sides))
    for start in range(0, len(c), block):
        kernel = (c[start:] @ c[start : start + block].T) ** 2
        kernel[block:] *= 2  # for those of j < k, which are never computed
        squares += np.einsum("ij,ij->i", sides[:, start:] @ kernel, sides[:, start : start + block])
    return np.sqrt(squares).reshape(2, -1)


def eigenvalue(a: Array, b: Array, w: Array, enough: float) -> float:
    """An upper bound of the eigenvalue of one channel, w [F]; looks for a better s while it is above `enough`.

    For one n the best s_j² is |y_j| / |x_j|. So s⁴ moves to the mean of y² over that of x², over n drawn as M says.
    """
    s, best = balance(a, b), math.inf
    for _ in range(4):
        c = (s * a + np.sign(w)[:, None] * b / s) / 2 * np.sqrt(np.abs(w))[:, None]
        m = c.T @ c
        best = min(best, largest_eigenvalue(m))
        if best <= enough:
            break
        y, x = (np.abs(np.einsum("fe,fe->f", rows @ m, rows))[:, None] + TINY for rows in (b, a))
        s = np.sqrt(s * (y / x) ** 0.25)
    return best


def norms(rows: Array) -> Array:
    """Euclidean norms over the last axis."""
    lengths: Array = np.sqrt(np.einsum("...i,...i->...", rows, rows))
    return lengths


def spectral_norm(matrix: Array) -> float:
    """From above: the factor by which `matrix` [out, in] lengthens a vector at most."""
    small = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(largest_eigenvalue(small))


def largest_eigenvalue(m: Array) -> float:
    """An upper bound of the largest eigenvalue of `m` [n, n], symmetric and positive semidefinite.

    Guessed by power iteration, proved by Cholesky: if t I - m has a float64 factor R, then t I - m + e = R' R has no
    negative eigenvalue, and |e| <= n (n + 1) 2^-53 t, less than 1e-8 t for n <= 8192. Rounding of `m` itself, a sum of
    F squares, moves its eigenvalues by at most F 2^-53 times its trace, 2e-7 t. SLACK covers both.
    """
    trace = float(np.trace(m))
    if not 0 < trace < math.inf:
        return trace
    vector = m[:, int(np.argmax(np.diag(m)))]
    for _ in range(30):
        vector = m @ (vector / np.linalg.norm(vector))
    bound = 1.01 * float(np.linalg.norm(vector))
    while bound < trace:  # which no eigenvalue exceeds
        try:
            np.linalg.cholesky(bound * np.eye(len(m)) - m)
            return bound
        except np.linalg.LinAlgError:
            bound *= 1.03
    return trace


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m stabilitykit.proof.check FOLDER")
        return 2
    checked = check(Path(arguments[0]))
    for kind, bound in checked.bounds.items():
        print(f"{kind:28} {bound:12,.0f}")
    print("Assumed:", *checked.assumptions, sep="\n- ")
    print(*(checked.problems or ["Proved: no prompt makes any tensor overflow float16."]), sep="\n")
    return 1 if checked.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
