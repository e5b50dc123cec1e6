"""Memory of one prefill: computed from the config alone, and measured in a process of its own.

`computed` walks the forward pass of `gemma/model.py` tensor by tensor, as it runs under `inference_mode` with
transformers' rounding. `measure` runs that pass in a fresh process, `python -m stabilitykit.experiment.memory`,
and reads the process's peak.
"""

import ctypes
import gc
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.errors import MisuseError, StabilityKitError
from stabilitykit.formats import number_format
from stabilitykit.results import Memory

if TYPE_CHECKING:
    from stabilitykit.gemma import Gemma
    from stabilitykit.gemma.matmul import Matmul


def computed(
    config: GemmaConfig, dtype: str, length: int, *, matmul: "Matmul" = "native", device: str = "cpu"
) -> tuple[int, int, int]:
    """Bytes of weights, KV cache, and activations of one prefill: one sequence of `length` tokens.

    The cache has room for exactly these tokens, and logits are the last token's. Activations are all other tensors of
    the pass, ids, masks, RoPE tables and copies in a wider dtype among them, at the moment at which they are most. With
    `matmul="float32-accumulate"` every product of 16-bit tensors holds float32 copies of its operands and result.
    What libraries take for themselves is not included. Raises MisuseError for an unknown dtype or a length below 1.
    """
    if length < 1:
        raise MisuseError(f"A length is at least 1 token; {length} is not.")
    size = number_format(dtype).bits // 8
    weights = sum(map(math.prod, parameter_shapes(config).values())) * size
    cache = 2 * config.layers * config.kv_heads * length * config.head_dim * size
    prefill = _Prefill(
        config=config,
        length=length,
        size=size,
        accumulates=size == 2 and matmul == "float32-accumulate",
        # CUDA's softmax reads float16 and computes float32 in one kernel; for bfloat16, and on a CPU, it is cast first.
        casts_scores=size == 2 and not (dtype == "float16" and device.startswith("cuda")),
    )
    prefill.run()
    return weights, cache, prefill.peak


@dataclass(slots=True, kw_only=True)
class _Prefill:
    """The tensors of a forward pass as bytes that come and go, in the order of `gemma/model.py`, method by method.

    A method that stands for an expression returns the bytes of its result, which its caller frees where the name
    that holds the tensor is bound anew or goes out of scope. Arguments stay alive during a call.
    """

    config: GemmaConfig
    length: int
    size: int  # bytes of an element of the model's dtype
    accumulates: bool
    casts_scores: bool
    live: int = 0
    peak: int = 0

    @property
    def wide(self) -> int:
        """Bytes of an element where the model computes in at least float32."""
        return max(4, self.size)

    def new(self, elements: int, size: int | None = None) -> int:
        taken = elements * (self.size if size is None else size)
        self.live += taken
        self.peak = max(self.peak, self.live)
        return taken

    def free(self, *taken: int) -> None:
        self.live -= sum(taken)

    def replaced(self, old: int, new: int) -> int:
        """`x = f(x)`: the old tensor lives until the new one is there."""
        self.free(old)
        return new

    def run(self) -> None:
        config, hidden = self.config, self.length * self.config.hidden_size
        self.new(self.length, 8)  # token ids
        for is_global in sorted({config.is_global(index) for index in range(config.layers)}):
            self.mask(windowed=not is_global and config.window is not None)
            self.rope()
        h = self.replaced(self.new(hidden), self.new(hidden))  # embedding rows, then times sqrt(hidden)
        for _ in range(config.layers):
            h = self.replaced(h, self.layer())
        self.replaced(h, self.norm(self.length, config.hidden_size))
        logits = self.product(config.hidden_size, config.hidden_size * config.vocabulary, config.vocabulary)
        if config.logit_softcap is not None:
            self.replaced(logits, self.soft_cap(config.vocabulary))

    def mask(self, *, windowed: bool) -> None:
        positions = self.new(2 * self.length, 8)
        allowed = self.new(self.length**2, 1)
        if windowed:
            first = self.new(self.length, 8)
            inside = self.replaced(first, self.new(self.length**2, 1))
            both = self.new(self.length**2, 1)
            self.free(allowed, inside)
            allowed = both
        self.new(self.length**2)
        self.free(positions, allowed)

    def rope(self) -> None:
        elements = self.length * self.config.head_dim
        positions = self.replaced(self.new(self.length, 8), self.new(self.length, 4))
        angles = self.new(elements // 2, 4) + self.new(elements, 4)
        for _ in ("cos", "sin"):
            table = self.new(elements, 4)
            if self.size != 4:
                self.replaced(table, self.new(elements))
        self.free(positions, angles)

    def layer(self) -> int:
        config, hidden = self.config, self.length * self.config.hidden_size
        x = self.norm(self.length, config.hidden_size)
        a = self.replaced(x, self.attention())
        if config.post_norms:
            a = self.replaced(a, self.norm(self.length, config.hidden_size))
        h = self.new(hidden)
        x = self.norm(self.length, config.hidden_size)
        m = self.replaced(x, self.mlp())
        if config.post_norms:
            m = self.replaced(m, self.norm(self.length, config.hidden_size))
        out = self.new(hidden)
        self.free(a, h, m)
        return out

    def attention(self) -> int:
        config, length = self.config, self.length
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = (self.linear(config.hidden_size, width) for width in (queries, keys, keys))
        if config.query_key_norm:
            q = self.replaced(q, self.norm(length * config.heads, config.head_dim))
            k = self.replaced(k, self.norm(length * config.kv_heads, config.head_dim))
        q = self.replaced(q, self.rotated(length * queries))
        k = self.replaced(k, self.rotated(length * keys))
        # A single key/value head is repeated as a view.
        repeated = self.new(2 * length * queries) if config.heads > config.kv_heads > 1 else 0

        elements = config.heads * length**2
        scores = self.product(length * queries, length * queries, elements)
        scores = self.replaced(scores, self.new(elements))  # times the query scale
        capped = 0 if config.attention_softcap is None else self.soft_cap(elements)
        scores = self.replaced(scores + capped, self.new(elements))  # plus the mask
        cast = self.new(elements, self.wide) if self.casts_scores else 0
        p = self.replaced(cast, self.new(elements, self.wide))
        if self.wide != self.size:
            p = self.replaced(p, self.new(elements))
        out = self.product(elements, length * queries, length * queries)
        if length > 1 and config.heads > 1:  # else its transpose is contiguous already
            out = self.replaced(out, self.new(length * queries))
        projected = self.linear(queries, config.hidden_size)
        self.free(q, k, v, repeated, scores, p, out)
        return projected

    def mlp(self) -> int:
        hidden, inner = self.config.hidden_size, self.config.feed_forward
        gate = self.linear(hidden, inner)
        gate = self.replaced(gate, self.new(self.length * inner))
        up = self.linear(hidden, inner)
        gated = self.replaced(gate + up, self.new(self.length * inner))
        return self.replaced(gated, self.linear(inner, hidden))

    def norm(self, rows: int, channels: int) -> int:
        elements = rows * channels
        wide = self.new(elements, 4) if self.size == 2 else 0
        squares = self.new(elements, self.wide)
        mean = self.replaced(squares, self.new(rows, self.wide))
        normed = self.replaced(mean, self.new(elements, self.wide))
        weight = self.new(channels, 4) if self.size == 2 else 0
        gain = self.replaced(weight, self.new(channels, self.wide))
        out = self.new(elements, self.wide)
        if self.size == 2:
            out = self.replaced(out, self.new(elements))
        self.free(wide, normed, gain)
        return out

    def rotated(self, elements: int) -> int:
        by_cos = self.new(elements)
        turned = self.replaced(self.new(elements // 2), self.new(elements))
        by_sin = self.replaced(turned, self.new(elements))
        return self.replaced(by_cos + by_sin, self.new(elements))

    def soft_cap(self, elements: int) -> int:
        scaled = self.new(elements)
        bounded = self.replaced(scaled, self.new(elements))
        return self.replaced(bounded, self.new(elements))

    def linear(self, inputs: int, outputs: int) -> int:
        return self.product(self.length * inputs, inputs * outputs, self.length * outputs)

    def product(self, left: int, right: int, out: int) -> int:
        """A matrix product: elements of both operands and of the result."""
        if not self.accumulates:
            return self.new(out)
        return self.replaced(self.new(left + right, 4) + self.new(out, 4), self.new(out))


def measure(checkpoint: str, dtype: str, length: int, device: str, *, matmul: "Matmul | None" = None) -> Memory:
    """The memory of one prefill of `length` tokens, computed and measured; takes a few seconds and the pass.

    `matmul` is `preferred_matmul(dtype, device)` unless given, for both numbers. `libraries` is what a fresh
    process holds once everything is imported and a tiny model has run, `peak` what it holds at most during the prefill,
    with the weights but not what was needed to read them.

    On a CPU both are resident memory. On Linux the peak is reset just before the prefill; on macOS it is that of the
    process's whole life, reading the checkpoint included, which in 16 bits takes more than a short prefill. On CUDA the
    peak is exact for tensors, and `libraries` is all else in use on the device, by other processes too.

    Raises MisuseError for what cannot be meant, and StabilityKitError, with the reason, where the process runs out of
    memory, is killed, or fails.
    """
    command = [sys.executable, "-P", "-m", __spec__.name, checkpoint, dtype, str(length), device, matmul or ""]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, errors="replace")
    what = f"Measuring {length:,} tokens in {dtype} on {device}"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        why = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        raise StabilityKitError(f"{what}: the process was killed by {name}{why}. Try a shorter length.")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise StabilityKitError(f"{what}: the process failed with code {done.returncode}: {reason}")
    found = json.loads(lines[-1])
    match found:
        case {"misuse": str(message)}:
            raise MisuseError(message)
        case {"out of memory": str(message)}:
            raise StabilityKitError(f"{what}: out of memory: {message} Try a shorter length.")
        case {"error": str(message)}:
            raise StabilityKitError(f"{what}: {message}")
    return Memory(**found)


def _environment() -> dict[str, str]:
    """The child's: this package can be imported, and freed tensors go back to the system at once.

    glibc keeps freed blocks for later ones, by rules that adapt to a program's history; resident memory would then
    be the tensors and what malloc was holding, which varies by a fifth. Its settings change the speed but not
    which tensors live.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(paths)}


def _measured(checkpoint: str, dtype: str, length: int, device: str, matmul: "Matmul | None") -> Memory:
    """Run in the child."""
    import torch

    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.gemma import build
    from stabilitykit.gemma.load import parse_device, parse_dtype
    from stabilitykit.gemma.matmul import preferred_matmul

    parse_dtype(dtype)
    place = parse_device(device)
    if place.type not in ("cpu", "cuda"):
        raise MisuseError(f"Memory is measured on a CPU or with CUDA; torch keeps no peak for {device!r}.")
    matmul = matmul or preferred_matmul(dtype, place.type)
    # Loads what is loaded when first used: kernels, the BLAS and its buffers, threads.
    tiny = open_checkpoint("random:gemma3-270m?layers=2&vocabulary=3000")
    _prefill(build(tiny, dtype=dtype, device=device), 64, matmul)
    libraries = _in_use(place.type)
    before = 0 if place.type == "cpu" else torch.cuda.memory_allocated()

    opened = open_checkpoint(checkpoint)
    config = opened.config
    if length > config.context:
        raise MisuseError(f"A prompt fits the model's context of {config.context:,} tokens; {length:,} do not.")
    weights, cache, activations = computed(config, dtype, length, matmul=matmul, device=place.type)
    model = build(opened, dtype=dtype, device=device)
    # The file's float32 tensors would be resident beside the model's own, and the vocabulary's strings with them.
    del opened
    model.vocabulary = None
    for parameter in model.parameters():
        parameter.sum()  # a mapped tensor is resident once it has been read
    _reset_peak(place.type)
    _prefill(model, length, matmul)
    return Memory(
        dtype=dtype,
        length=length,
        device=device,
        weights=weights,
        cache=cache,
        activations=activations,
        libraries=libraries,
        peak=_peak(place.type, libraries, before),
    )


def _prefill(model: "Gemma", length: int, kind: "Matmul") -> None:
    import torch

    from stabilitykit.gemma.kv_cache import KVCache
    from stabilitykit.gemma.matmul import matmul

    ids = (torch.arange(length, device=model.device) % model.config.vocabulary)[None]
    cache = KVCache(model.config, batch=1, length=length, dtype=model.dtype, device=model.device)
    with torch.inference_mode(), matmul(kind):
        model(ids, cache=cache, last_only=True)


def _in_use(device: str) -> int:
    """Bytes resident, or in use on the device by anyone."""
    if device == "cpu":
        _give_back()
        return _resident("VmRSS")
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.memory_allocated()


def _reset_peak(device: str) -> None:
    if device == "cpu":
        _give_back()
        if sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes what is resident now
            except OSError as error:
                raise StabilityKitError(
                    "A process's peak of memory is reset through /proc/self/clear_refs, which cannot be written here "
                    f"({error.strerror}). Measure outside this container."
                ) from None
    else:
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak(device: str, libraries: int, before: int) -> int:
    """`before` is what torch held on the device when `libraries` was read, and is part of it."""
    if device == "cpu":
        return _resident("VmHWM")
    import torch

    torch.cuda.synchronize()
    return libraries + torch.cuda.max_memory_allocated() - before


def _give_back() -> None:
    """Returns to the system what was freed in small pieces."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)


def _resident(field: str) -> int:
    """Bytes: `field` of /proc/self/status, or the most there ever were where there is no such file."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    try:
        import resource
    except ImportError:
        raise MisuseError(f"Memory is measured on Linux and macOS; {sys.platform} has no getrusage.") from None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main(arguments: list[str]) -> None:
    """Prints one line of JSON: the Memory, or what kept it from being measured."""
    checkpoint, dtype, length, device, matmul = arguments
    found: dict[str, Any]
    try:
        found = asdict(_measured(checkpoint, dtype, int(length), device, cast("Matmul | None", matmul or None)))
    except MisuseError as error:
        found = {"misuse": str(error)}
    except StabilityKitError as error:
        found = {"error": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        found = {"out of memory": (str(error).splitlines() or [""])[0]}
    print(json.dumps(found))


def _is_out_of_memory(error: Exception) -> bool:
    """Torch's CPU allocator raises a plain RuntimeError; CUDA's has a class of its own."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


if __name__ == "__main__":
    _main(sys.argv[1:])
