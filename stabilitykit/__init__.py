"""Find where, and why, Gemma leaves float16's range.

    import stabilitykit as sk

    model = sk.load("gemma3-270m", dtype="float16")
    tokens = model.tokenizer.encode("The capital of France is")
    with sk.record(model) as recording:
        logits = model(torch.tensor([tokens]))
    print(sk.verdict(recording))

Torch is imported only by the names that need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabilitykit.checkpoints import open_checkpoint as open_checkpoint
    from stabilitykit.diagnosis import chain as chain
    from stabilitykit.diagnosis import verdict as verdict
    from stabilitykit.formats import FORMATS as FORMATS
    from stabilitykit.formats import NumberFormat as NumberFormat
    from stabilitykit.models.gemma import build as build
    from stabilitykit.models.gemma import generate as generate
    from stabilitykit.models.gemma import load as load
    from stabilitykit.recorder import record as record
    from stabilitykit.records import Recording as Recording

_HOMES = {
    "FORMATS": "formats",
    "NumberFormat": "formats",
    "Recording": "records",
    "build": "models.gemma",
    "chain": "diagnosis",
    "generate": "models.gemma",
    "load": "models.gemma",
    "open_checkpoint": "checkpoints",
    "record": "recorder",
    "verdict": "diagnosis",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"stabilitykit has {', '.join(_HOMES)}; {name!r} is not among them")
    return getattr(import_module(f"stabilitykit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
