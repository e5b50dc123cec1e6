"""One prefill in a process of its own: how much memory it takes, and what becomes of it where there is too little.

The process is `python -m stabilitykit.run.prefill`. It prints one JSON document a line; the last one counts.
"""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabilitykit.errors import MisuseError, StabilityKitError
from stabilitykit.models.gemma.footprint import footprint
from stabilitykit.records.sweep import Footprint, Memory, Shortage

if TYPE_CHECKING:
    import torch

    from stabilitykit.models.gemma import Gemma


def measure(checkpoint: str, dtype: str, length: int, device: str) -> Memory:
    """The memory of one prefill of `length` tokens, computed and measured; takes a few seconds and the pass.

    `libraries` is what a fresh process holds once everything is imported and a tiny model has run, `peak` what it
    holds at most during the prefill, with the weights but not what was needed to read them.

    On a CPU both are resident memory. On Linux the peak is reset just before the prefill; on macOS it is that of the
    process's whole life, reading the checkpoint included, which in 16 bits takes more than a short prefill. On CUDA the
    peak is exact for tensors, and `libraries` is all else in use on the device, by other processes too.

    Raises MisuseError for what cannot be meant, and StabilityKitError, with the reason, where the process runs out of
    memory, is killed, or fails.
    """
    done, said = _process(checkpoint, dtype, length, device)
    what = f"Measuring {length:,} tokens in {dtype} on {device}"
    if done.returncode < 0:
        raise StabilityKitError(f"{what}: the process was killed by {_signal(done)}. Try a shorter length.")
    if "out of memory" in said[-1]:
        raise StabilityKitError(f"{what}: out of memory: {said[-1]['out of memory']} Try a shorter length.")
    return Memory(**said[-1])


def starve(checkpoint: str, dtype: str, length: int, device: str, share: float) -> Shortage:
    """What becomes of a prefill that may take `share` of the memory it needs beside the weights, as computed.

    On Linux the limit is RLIMIT_DATA, set once the weights are there; on CUDA it is torch's own for the process. Raises
    MisuseError for what cannot be meant and where there is no such limit, StabilityKitError where the process fails
    in any way before its pass begins.
    """
    done, said = _process(checkpoint, dtype, length, device, share)
    shortage = Shortage(**said[-1])
    if done.returncode < 0:
        return replace(shortage, outcome="killed", reason=f"the process was killed by {_signal(done)}")
    return shortage


def _process(
    checkpoint: str, dtype: str, length: int, device: str, share: float | None = None
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """A fresh process that has ended, and what it said, which is at least one thing."""
    arguments = [checkpoint, dtype, str(length), device, "" if share is None else str(share)]
    command = [sys.executable, "-P", "-m", __spec__.name, *arguments]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, errors="replace")
    said: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    if said and "misuse" in said[-1]:
        raise MisuseError(said[-1]["misuse"])
    if said and "error" in said[-1]:
        raise StabilityKitError(said[-1]["error"])
    if done.returncode > 0 or not said:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        how = f"was killed by {_signal(done)}" if done.returncode < 0 else f"failed with code {done.returncode}"
        raise StabilityKitError(f"The process that runs {length:,} tokens in {dtype} on {device} {how}: {reason}")
    return done, said


def _signal(done: "subprocess.CompletedProcess[str]") -> str:
    name = signal.Signals(-done.returncode).name
    return f"{name}, as the kernel does when memory runs out" if name == "SIGKILL" else name


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A model ready for its prefill, what that is computed to take, and what was in use before it was built."""

    model: "Gemma"
    matmul: str
    needs: Footprint
    libraries: int
    before: int
    device: "torch.device"


def _prepare(checkpoint: str, dtype: str, length: int, device: str) -> _Prepared:
    import torch

    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.models.devices import parse_device, parse_dtype
    from stabilitykit.models.gemma import build
    from stabilitykit.models.matmul import preferred_matmul

    parse_dtype(dtype)
    place = parse_device(device)
    if place.type not in ("cpu", "cuda"):
        raise MisuseError(f"Memory is measured on a CPU or with CUDA; torch keeps no peak for {device!r}.")
    chosen = preferred_matmul(dtype, place.type)
    # Loads what is loaded when first used: kernels, the BLAS and its buffers, threads.
    tiny = open_checkpoint("random:gemma3-270m?layers=2&vocabulary=3000")
    _prefill(build(tiny, dtype=dtype, device=device, stream=False), 64, chosen)
    footprint(tiny.config, dtype, 64, matmul=chosen, device=place.type)  # torch's own code for tensors without values
    libraries = _in_use(place.type)
    before = 0 if place.type == "cpu" else torch.cuda.memory_allocated()

    opened = open_checkpoint(checkpoint)
    config = opened.config
    if length > config.context:
        raise MisuseError(f"A prompt fits the model's context of {config.context:,} tokens; {length:,} do not.")
    model = build(opened, dtype=dtype, device=device, stream=False)
    # The file's float32 tensors would be resident beside the model's own, and the vocabulary's strings with them.
    del opened
    model.vocabulary = None
    for parameter in model.parameters():
        parameter.sum()  # a mapped tensor is resident once it has been read
    return _Prepared(
        model=model,
        matmul=chosen,
        needs=footprint(config, dtype, length, matmul=chosen, device=place.type),
        libraries=libraries,
        before=before,
        device=place,
    )


def _measured(prepared: _Prepared) -> Memory:
    place = prepared.device.type
    _reset_peak(place)
    _prefill(prepared.model, prepared.needs.length, prepared.matmul)
    peak = _peak(place, prepared.libraries, prepared.before)
    return Memory(**asdict(prepared.needs), libraries=prepared.libraries, peak=peak)


def _starved(prepared: _Prepared, share: float) -> Shortage:
    needs = prepared.needs
    needed = needs.cache + needs.activations
    shortage = Shortage(
        dtype=needs.dtype,
        length=needs.length,
        device=needs.device,
        needed=needed,
        room=int(share * needed),
        outcome="killed",
    )
    _limit(prepared.device, shortage.room)
    _say(asdict(shortage))  # what stands if the process is killed from here on
    try:
        logits = _prefill(prepared.model, needs.length, prepared.matmul)
        return replace(shortage, outcome="finite" if bool(logits.isfinite().all()) else "not finite")
    except (MemoryError, RuntimeError) as error:
        lines = str(error).splitlines()
        return replace(shortage, outcome="raised", reason=f"{type(error).__name__}: {lines[0] if lines else ''}")


def _limit(device: "torch.device", room: int) -> None:
    """From here on the process gets `room` bytes more than it has."""
    if device.type == "cuda":
        import torch

        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + room) / total, device)
    elif sys.platform == "linux":
        import resource

        _give_back()
        bound = _resident("VmData") + room
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    else:
        raise MisuseError(f"A process's memory is limited on Linux and with CUDA; {sys.platform} has no such limit.")


def _prefill(model: "Gemma", length: int, kind: str) -> "torch.Tensor":
    import torch

    from stabilitykit.models.gemma.kv_cache import KVCache
    from stabilitykit.models.matmul import matmul

    ids = (torch.arange(length, device=model.device) % model.config.vocabulary)[None]
    cache = KVCache(model.config, batch=1, length=length, dtype=model.dtype, device=model.device)
    with torch.inference_mode(), matmul(kind):
        logits: torch.Tensor = model(ids, cache=cache, last_only=True)
    return logits


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


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def _main(arguments: list[str]) -> None:
    """Prints what became of the prefill, or what kept it from being run."""
    checkpoint, dtype, length, device, share = arguments
    try:
        prepared = _prepare(checkpoint, dtype, int(length), device)
        _say(asdict(_starved(prepared, float(share)) if share else _measured(prepared)))
    except MisuseError as error:
        _say({"misuse": str(error)})
    except StabilityKitError as error:
        _say({"error": str(error)})
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _say({"out of memory": (str(error).splitlines() or [""])[0]})


def _is_out_of_memory(error: Exception) -> bool:
    """Torch's CPU allocator raises a plain RuntimeError; CUDA's has a class of its own."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


if __name__ == "__main__":
    _main(sys.argv[1:])
