"""Proves from its weights alone that no prompt can break a Gemma in float16, or says which tensor could.

    python -m stabilitykit.bounds.check FOLDER

FOLDER is a Hugging Face folder of a Gemma 1, 2 or 3 in float16, with a proof.json:

    {"schema": 1, "dtype": "float16", "limit": 65504,
     "sha256": {"config.json": hex, "model.safetensors": hex, ...},    the config, every *.safetensors, an index
     "bounds": {kind of tensor: largest magnitude, ...},               what the writer claims; none above the limit
     "digest": hex}    SHA-256 of all other keys as JSON: keys sorted, no spaces, ASCII, shortest floats

Nothing is taken from the code that makes such folders: the files say what the model is, and each inequality stands here.

What is assumed of the arithmetic. Norms and softmax are computed in float32; products of matrices are summed in
float32, in any order; every other operator, and each of these, rounds its result once to float16: by a factor within
2^-11 of 1 or, below 2^-14, by at most 2^-25. Prompts have no padding (a row that sees no key may be NaN) and at most
2^20 tokens, since a float32 sum of n terms errs by n · 2^-24. Masked scores, infinite or not, become probability 0
and are no tensor of this proof. RoPE tables, probabilities and tanh never exceed 1.

Rounding. An RMSNorm returns g ∘ n with |n| ≤ sqrt(d), d its channels, for any input: finite eps > 0 only shrinks n.
Float32 lets |n| grow by d · 2^-25 and rounding to float16 by 2^-11; what rounds below 2^-14 is less than 2^-13 in n
if no gain counts as smaller than 2^-12. So rounded outputs are exact ones of a ball 0.09% larger (d ≤ 8192), and
every bound below is taken over that ball. The longest way from there to a tensor is that to the scores:

    two balls 0.2%; the float32 sums of q and k, sqrt(D) · d · 2^-24 each (D ≤ 256): 1.6% at the very most,
    0.7% in any Gemma; RoPE, table, product and sum, sqrt(2) · 3 · 2^-11 each: 0.5%; q, k, q · k, its scaling and
    its division by a soft-cap 2^-11 each: 0.3%

and under 2.6% in all. The way to down_proj has two balls, gate, gelu, up, their product and the result: 0.5%. What is
relative to a sum of magnitudes rather than to the bound (sums of float32 whose terms cancel) is added where it
occurs. SLACK is 3%; with an absolute 1 for subnormal results it also covers this file's own float64.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
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
TINY = 1e-30

# The probabilities stored for one query: float32's sum in the denominator is short by a factor 1 - 2^-4 at most,
# each rounds by 2^-11 or, where subnormal, by 2^-25: 1.0667 · 1.0005 + 2^20 · 2^-25 < 1.1. Their products with
# values are summed in float32, each channel with its own error, below e^(1/16) - 1 < 0.065.
PROBABILITIES = 1.1
MIXING = 0.065

_GENERATIONS = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}
_KNOWN = frozenset(
    """architectures model_type dtype torch_dtype vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps hidden_activation
    attention_bias attention_dropout tie_word_embeddings bos_token_id eos_token_id pad_token_id rope_theta
    query_pre_attn_scalar sliding_window layer_types attn_logit_softcapping final_logit_softcapping
    rope_local_base_freq rope_scaling sliding_window_pattern rope_parameters""".split()
)


class _RefusedError(Exception):
    """A folder that cannot be examined; str() is the sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """`problems` are sentences, none where the folder is proved. `bounds` are this file's own, by kind of tensor.

    A bound is a magnitude, the largest of all layers and channels; it holds whether or not it is within float16.
    `rows` counts the bounds on channels of down_proj that the screen left open, and Cholesky was asked about.
    """

    problems: tuple[str, ...]
    bounds: dict[str, float]
    rows: int


def check(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> Checked:
    """Whether the Gemma in `folder` is the one its proof.json describes, and proved. Never raises for what is in it.

    `progress` is called with the layers that are done and those in all.
    """
    folder = Path(folder)
    try:
        problems = list(_unlike_its_proof(folder))
    except _RefusedError as refused:
        problems = [str(refused)]
    proof = None
    try:
        proof = _Proof(_Model(folder))
        proof.run(progress or (lambda done, layers: None))
        problems += proof.problems()
    except _RefusedError as refused:
        problems += [] if str(refused) in problems else [str(refused)]
    return Checked(
        problems=tuple(problems), bounds=dict(proof.bounds) if proof else {}, rows=proof.rows if proof else 0
    )


def _unlike_its_proof(folder: Path) -> Iterator[str]:
    proof = _json(folder / "proof.json")
    rest = {key: value for key, value in proof.items() if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    if proof.get("digest") != hashlib.sha256(canonical.encode()).hexdigest():
        yield "proof.json is not as it was written: its digest is another."
    if (proof.get("schema"), proof.get("dtype"), proof.get("limit")) != (1, "float16", LIMIT):
        yield "proof.json speaks of schema 1, dtype float16 and limit 65504; this one does not."
    hashes, bounds = proof.get("sha256"), proof.get("bounds")
    if not isinstance(hashes, dict) or not isinstance(bounds, dict) or not bounds:
        yield "proof.json has sha256, by file, and bounds, by kind of tensor; this one does not."
        return
    files = {path.name for pattern in ("config.json", "*.safetensors", "*.index.json") for path in folder.glob(pattern)}
    if files != set(hashes):
        yield f"proof.json is about {', '.join(sorted(hashes))}; the folder has {', '.join(sorted(files))}."
    for name in sorted(files & set(hashes)):
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != hashes[name]:
                yield f"{name} has changed since the proof was written: its SHA-256 is another."
    for kind, bound in bounds.items():
        if type(bound) not in (int, float) or not 0 <= bound <= LIMIT:
            yield f"proof.json claims {bound} for {kind}, which is no number from 0 to 65,504."


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _RefusedError(f"{path.name} cannot be read: {error}.") from error
    if not isinstance(read, dict):
        raise _RefusedError(f"{path.name} holds an object of JSON; this one holds something else.")
    return read


class _Model:
    """The folder's sizes and tensors. Whatever could make the model another than is assumed here is refused."""

    def __init__(self, folder: Path) -> None:
        config = self.config = _json(folder / "config.json")
        if unknown := sorted(set(config) - _KNOWN):
            raise _RefusedError(f"config.json has keys whose effect on the proof is unknown: {', '.join(unknown)}.")
        self.generation = _GENERATIONS.get(str(config.get("model_type")), 0)
        if not self.generation:
            raise _RefusedError(f"model_type is one of {', '.join(_GENERATIONS)}; it is {config.get('model_type')!r}.")
        if (config.get("hidden_activation"), config.get("attention_bias"), config.get("tie_word_embeddings")) != (
            "gelu_pytorch_tanh", False, True,
        ):  # fmt: skip
            raise _RefusedError("A Gemma has hidden_activation gelu_pytorch_tanh, no attention_bias and a tied head.")
        ropes = json.dumps([config.get("rope_scaling"), config.get("rope_parameters")])
        if ropes.count("rope_type") != ropes.count('"default"') + ropes.count('"linear"') or '"type"' in ropes:
            raise _RefusedError("A Gemma's rope_type is default or linear: others scale cos and sin.")
        self.hidden, self.inner = self._size("hidden_size", 8192), self._size("intermediate_size", 2**17)
        self.heads, self.kv_heads = self._size("num_attention_heads", 256), self._size("num_key_value_heads", 256)
        self.head, self.layers = self._size("head_dim", 256), self._size("num_hidden_layers", 256)
        self.vocabulary = self._size("vocab_size", 2**24)
        if self.head % 2 or self.heads % self.kv_heads or self.heads * self.head > 8192:
            raise _RefusedError("Heads have pairs of channels, share keys evenly and have at most 8192 channels in all.")
        self._positive("rms_norm_eps", 2.0**-100)
        self.scale = self.head**-0.5
        self.score_cap = self.logit_cap = math.inf
        if self.generation > 1:
            self.scale = self._positive("query_pre_attn_scalar") ** -0.5
            if config.get("attn_logit_softcapping", 0) is not None:
                self.score_cap = self._positive("attn_logit_softcapping")
            if config.get("final_logit_softcapping", 0) is not None:
                self.logit_cap = self._positive("final_logit_softcapping")
        self._open(folder)

    def _size(self, key: str, largest: int) -> int:
        value = self.config.get(key)
        if type(value) is not int or not 1 <= value <= largest:
            raise _RefusedError(f"{key} in config.json is a whole number from 1 to {largest}; it is {value!r}.")
        return value

    def _positive(self, key: str, least: float = 2.0**-20) -> float:
        value = self.config.get(key)
        if type(value) not in (int, float) or not least <= value <= 2.0**20:
            raise _RefusedError(f"{key} in config.json is a number from {least:.3g} to 2^20; it is {value!r}.")
        return float(value)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner, queries, keys = self.hidden, self.inner, self.heads * self.head, self.kv_heads * self.head
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        if self.generation > 1:
            layer |= {"pre_feedforward_layernorm": (hidden,), "post_feedforward_layernorm": (hidden,)}
        if self.generation == 3:
            layer |= {"self_attn.q_norm": (self.head,), "self_attn.k_norm": (self.head,)}
        found = {f"layers.{index}.{name}": shape for index in range(self.layers) for name, shape in layer.items()}
        return found | {"embed_tokens": (self.vocabulary, hidden), "norm": (hidden,)}

    def _open(self, folder: Path) -> None:
        self._slices: dict[str, Any] = {}
        where: dict[str, str] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file = safe_open(path, framework="np")
                for name in file.keys():  # noqa: SIM118
                    if name in where:
                        raise _RefusedError(f"{name} is in {where[name]} and in {path.name}.")
                    where[name] = path.name
                    self._slices[name] = file.get_slice(name)
        except (OSError, SafetensorError) as error:
            raise _RefusedError(f"{path.name} cannot be read: {error}.") from error
        shapes = {f"model.{name}.weight": shape for name, shape in self._shapes().items()}
        if odd := sorted(set(shapes) ^ set(where)):
            raise _RefusedError(f"{odd[0]} is {'missing' if odd[0] in shapes else 'unknown'}, and {len(odd) - 1} more.")
        for name, shape in shapes.items():
            if (self._slices[name].get_dtype(), tuple(self._slices[name].get_shape())) != ("F16", shape):
                raise _RefusedError(f"{name} is float16 of shape {shape} by the config, and another in the file.")
        index = folder / "model.safetensors.index.json"
        if set(where.values()) != {"model.safetensors"} and _json(index).get("weight_map") != where:
            raise _RefusedError(f"{index.name} does not say in which file each tensor is.")

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows of a matrix [out, in], or elements of a vector, in float64."""
        read: Array = self._slices[f"model.{name}.weight"][start:stop].astype(np.float64)
        if not np.isfinite(read).all():
            raise _RefusedError(f"{name} holds weights that are not finite.")
        return read

    def gain(self, name: str) -> Array:
        """1 + w, none smaller than 2^-12: see above, on rounding."""
        gain = 1 + self.rows(name)
        return np.copysign(np.maximum(np.abs(gain), 2.0**-12), gain)


class _Proof:
    def __init__(self, model: _Model) -> None:
        self.model = model
        self.bounds: dict[str, float] = {}
        self.over: dict[str, list[str]] = {}
        self.rows = 0

    def hold(self, kind: str, place: int | str, exact: Array | float) -> Array:
        """Notes what a tensor is bounded by, from what it would be without rounding, and returns it, by channel."""
        bound: Array = SLACK * np.atleast_1d(np.asarray(exact, np.float64)) + 1
        return self.note(kind, place, bound)

    def note(self, kind: str, place: int | str, bound: Array) -> Array:
        worst = float(bound.max())
        self.bounds[kind] = max(self.bounds.get(kind, 0.0), worst)
        if not worst <= LIMIT:
            self.over.setdefault(kind, []).append(str(place))
        return bound

    def problems(self) -> list[str]:
        return [
            f"{kind} is not proved to stay within 65,504, only within {self.bounds[kind]:,.0f} (layers "
            f"{', '.join(places)})." for kind, places in self.over.items()
        ]  # fmt: skip

    def run(self, progress: Callable[[int, int], None]) -> None:
        model, root = self.model, math.sqrt(self.model.hidden)
        final = model.gain("norm")
        largest, logit = np.zeros(model.hidden), 0.0
        for start in range(0, model.vocabulary, 2**14):
            rows = model.rows("embed_tokens", start, start + 2**14)
            largest = np.maximum(largest, np.abs(rows).max(0))
            logit = max(logit, root * float(norms(rows * final).max()))
        stream = self.hold("embed_tokens", "the embedding", root * largest)
        for layer in range(model.layers):
            stream = self._layer(layer, f"layers.{layer}.", stream)
            progress(layer + 1, model.layers)
        self.hold("norm", "the last norm", root * np.abs(final))
        self.hold("lm_head", "the head", logit * max(1.0, 1 / model.logit_cap))

    def _layer(self, layer: int, prefix: str, stream: Array) -> Array:
        model, root = self.model, math.sqrt(self.model.hidden)

        def normed(name: str) -> tuple[Array, Array]:
            gain = model.gain(prefix + name)
            return gain, self.hold(name, layer, root * np.abs(gain))

        def added(stream: Array, branch: Array) -> Array:  # one rounding; the sum is exact where it is subnormal
            return self.note("residual", layer, (stream + branch) * (1 + HALF))

        branch = self._attention(layer, prefix, normed("input_layernorm")[0])
        if model.generation > 1:
            branch = normed("post_attention_layernorm")[1]
        stream = added(stream, branch)
        before = "pre_feedforward_layernorm" if model.generation > 1 else "post_attention_layernorm"
        branch = self._mlp(layer, prefix + "mlp.", normed(before)[0])
        if model.generation > 1:
            branch = normed("post_feedforward_layernorm")[1]
        return added(stream, branch)

    def _attention(self, layer: int, prefix: str, gain: Array) -> Array:
        """The bound on o_proj's channels [E]."""
        model, root, prefix = self.model, math.sqrt(self.model.hidden), prefix + "self_attn."
        q, k, v = (
            (model.rows(f"{prefix}{name}_proj") * gain).reshape(heads, model.head, model.hidden)
            for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads))
        )
        groups, half = model.heads // model.kv_heads, model.head // 2
        larger = max(1.0, model.scale)  # some scale q before q · k
        q_rows, k_rows, v_rows = root * norms(q), root * norms(k), root * norms(v)  # [heads, D]
        if model.generation == 3:
            self.hold("q_proj", layer, q_rows)
            self.hold("k_proj", layer, k_rows)
            # RoPE turns channels i and i + D/2 together, n's share of a pair at most scaled by the larger gain; the
            # pairs' products then sum to at most the largest gain · gain times |n| |m| <= D.
            q_gain, k_gain = (
                np.abs(model.gain(f"{prefix}{name}_norm")).reshape(2, half).max(0) for name in ("q", "k")
            )
            self.hold("q_norm", layer, math.sqrt(model.head) * q_gain * larger)
            self.hold("k_norm", layer, math.sqrt(model.head) * k_gain)
            scores = model.head * float((q_gain * k_gain).max())
        else:
            # A pair that turns puts at most its length into a channel.
            self.hold("q_proj", layer, np.hypot(q_rows[:, :half], q_rows[:, half:]) * larger)
            self.hold("k_proj", layer, np.hypot(k_rows[:, :half], k_rows[:, half:]))
            q_size, k_size = ([root * spectral_norm(head) + 2.0**-10 for head in heads] for heads in (q, k))
            scores = max(size * k_size[head // groups] for head, size in enumerate(q_size))
        self.hold("scores", layer, scores * max(1.0, model.scale, model.scale / model.score_cap))
        value = self.hold("v_proj", layer, v_rows)
        self.hold("attention", layer, PROBABILITIES * (1 + MIXING) * value)

        # A head returns a mean of values, so that its share of a channel is at most its largest for one value. What
        # float32 and rounding do to single channels of v and of the mean does not cancel: 2 · 2^-11 and the sums.
        o = model.rows(f"{prefix}o_proj")
        exact, magnitudes = np.zeros(model.hidden), np.zeros(model.hidden)
        for head in range(model.heads):
            own = o[:, head * model.head : (head + 1) * model.head]
            exact += root * norms(own @ v[head // groups])
            magnitudes += np.abs(own) @ value[head // groups]
        lost = MIXING + 3 * HALF + (model.hidden + model.heads * model.head) * SINGLE
        return self.hold("o_proj", layer, PROBABILITIES * (exact + lost * magnitudes))

    def _mlp(self, layer: int, prefix: str, gain: Array) -> Array:
        """The bound on down_proj's channels [E]."""
        model, d = self.model, self.model.hidden
        a, b = (model.rows(f"{prefix}{name}_proj") * gain for name in ("gate", "up"))  # [F, E]
        w = model.rows(f"{prefix}down_proj")  # [E, F]
        a_norm, b_norm = norms(a), norms(b)
        gate = self.hold("gate_proj", layer, math.sqrt(d) * a_norm)
        up = self.hold("up_proj", layer, math.sqrt(d) * b_norm)
        # Of one n: (a · n)(b · n) is largest halfway between a and b.
        product = d * (a_norm * b_norm + np.abs(np.einsum("fe,fe->f", a, b))) / 2
        self.hold("gate · up", layer, np.maximum(product, GELU_DIP * up))

        # With x = a · n, y = b · n: where x < 0, |gelu(x) y| <= 0.1701 |y|. Float32's errors of x and y are relative to
        # their bounds, d · 2^-24 each, and so is down_proj's own, F · 2^-24; so are roundings below 2^-14.
        dips = GELU_DIP * math.sqrt(d) * np.minimum(np.abs(w) @ b_norm, norms(w) * spectral_norm(b))
        lost = (3 * d + 2 * model.inner) * SINGLE * (np.abs(w) @ (gate * up))
        # In generation 1 what is returned is added up, layer by layer: a share of the limit is asked of each.
        share = LIMIT if model.generation > 1 else LIMIT / (2 * model.layers)
        down = Down(a, b, w)
        screens = down.screen()
        bounds = [SLACK * (d * eigenvalue + dips + lost) + 1 for eigenvalue in screens]
        for upward, bound in zip((True, False), bounds, strict=True):
            for row in np.argsort(-bound):
                if bound[row] <= share:
                    break
                self.rows += 1
                rest = dips[row] + lost[row]
                eigenvalue = down.eigenvalue(int(row), upward, (((share - 1) / SLACK) - rest) / d)
                bound[row] = min(bound[row], SLACK * (d * eigenvalue + rest) + 1)
                if not bound[row] <= LIMIT:
                    break  # the layer is not proved; how far the others are from it would take long
        return self.note("down_proj", layer, np.maximum(*bounds))


class Down:
    """Channels of down_proj: the sum over j of w_j gelu(x_j) y_j, x_j = a_j · n, y_j = b_j · n, where x_j > 0.

    There 0 <= gelu(x) <= x, and w x y <= |w| (s x + sign(w) y / s)² / 4 for every s > 0, as u v <= (u + v)² / 4. So the
    sum is at most |n|² times the largest eigenvalue of M = sum |w_j| c_j c_j', c_j = (s_j a_j + sign(w_j) b_j / s_j) / 2;
    terms with x < 0 only add squares. The smallest value is that of -w.
    """

    def __init__(self, a: Array, b: Array, w: Array) -> None:
        self.a, self.b, self.w = a, b, w  # [F, E], [F, E], [E, F]
        self.s = np.sqrt((norms(b) + TINY) / (norms(a) + TINY))  # [F]; makes |c_j| least over all signs

    def screen(self, block: int = 1024) -> tuple[Array, Array]:
        """Upper bounds [E] of each channel's eigenvalue, upward and downward: the Frobenius norms of M.

        Their squares are sums over j, k of |w_j| |w_k| (c_j · c_k)², for all channels one product of matrices.
        """
        s = self.s[:, None]
        c = np.concatenate([s * self.a + self.b / s, s * self.a - self.b / s]) / 2  # [2F, E], for either sign
        positive, negative = np.maximum(self.w, 0), np.maximum(-self.w, 0)
        sides = np.concatenate([np.hstack([positive, negative]), np.hstack([negative, positive])])  # [2E, 2F]
        squares = np.zeros(len(sides))
        for start in range(0, len(c), block):
            kernel = (c @ c[start : start + block].T) ** 2
            squares += np.einsum("ij,ij->i", sides @ kernel, sides[:, start : start + block])
        upward, downward = np.split(np.sqrt(squares), 2)
        return upward, downward

    def eigenvalue(self, row: int, upward: bool, enough: float) -> float:
        """An upper bound of one channel's eigenvalue; looks for a better s until it is at most `enough`.

        s_j² = |y_j| / |x_j| would be best where n is known: s⁴ is chosen as the mean of y² over that of x², over the
        directions in which M is large, first a little and then more so.
        """
        w = self.w[row] if upward else -self.w[row]
        s, best = self.s[:, None], math.inf
        for _ in range(5):
            c = (s * self.a + np.sign(w)[:, None] * self.b / s) / 2 * np.sqrt(np.abs(w))[:, None]
            m = c.T @ c
            best = min(best, largest_eigenvalue(m))
            if best <= enough:
                break
            y, x = (np.einsum("fe,fe->f", rows @ m, rows) for rows in (self.b, self.a))
            s = (s * ((np.abs(y) + TINY) / (np.abs(x) + TINY))[:, None] ** 0.25) ** 0.5
        return best


def norms(rows: Array) -> Array:
    """Euclidean norms over the last axis."""
    return np.sqrt(np.einsum("...i,...i->...", rows, rows))


def spectral_norm(matrix: Array) -> float:
    """From above: the factor by which `matrix` [out, in] lengthens a vector at most."""
    small = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(largest_eigenvalue(small))


def largest_eigenvalue(m: Array) -> float:
    """An upper bound of the largest eigenvalue of `m` [n, n], symmetric and positive semidefinite.

    Guessed by power iteration, proved by Cholesky: if t I - m has a float64 factor R, then t I - m + e = R' R has no
    negative eigenvalue, and |e| <= n (n + 1) 2^-53 t, less than 1e-8 t for n <= 8192. Rounding of `m` itself, a sum of F
    squares, moves its eigenvalues by at most F 2^-53 times its trace, 1e-7 t. SLACK covers both.
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


def main(arguments: Mapping[int, str] | list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m stabilitykit.bounds.check FOLDER")
        return 2
    checked = check(Path(arguments[0]))
    for kind, bound in checked.bounds.items():
        print(f"{kind:28} {bound:12,.0f}")
    for problem in checked.problems:
        print(problem)
    if not checked.problems:
        print("Proved: no prompt makes a tensor leave float16's range.")
    return 1 if checked.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
