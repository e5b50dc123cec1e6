"""Find where, and why, a model overflows in float16.

    import stabilitykit as sk

    found = sk.profile("gemma3-270m", "The capital of France is", dtypes=["float16", "float32"])
    print(sk.verdict(found["float16"], found["float32"]))

    with sk.record(my_model) as recording:  # any torch.nn.Module
        my_model(my_input)
    print(sk.verdict(recording))

Torch is imported only by the names that need it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from stabilitykit.bounds.examine import bound as bound
    from stabilitykit.checkpoints import open_checkpoint as open_checkpoint
    from stabilitykit.diagnosis import chain as chain
    from stabilitykit.diagnosis import verdict as verdict
    from stabilitykit.diagnosis.compare import compare as compare
    from stabilitykit.formats import FORMATS as FORMATS
    from stabilitykit.formats import NumberFormat as NumberFormat
    from stabilitykit.gate.check import check as check
    from stabilitykit.guards.breaks import NumericalBreak as NumericalBreak
    from stabilitykit.guards.guard import guard as guard
    from stabilitykit.guards.processor import StabilityGuard as StabilityGuard
    from stabilitykit.models.gemma import build as build
    from stabilitykit.models.gemma import generate as generate
    from stabilitykit.models.gemma import load as load
    from stabilitykit.models.subject import Sampling as Sampling
    from stabilitykit.recorder import Statistic as Statistic
    from stabilitykit.recorder import Where as Where
    from stabilitykit.recorder import describe as describe
    from stabilitykit.recorder import record as record
    from stabilitykit.records import Recording as Recording
    from stabilitykit.remedies.repair import repair as repair
    from stabilitykit.remedies.verify import verify as verify
    from stabilitykit.remedies.verify import verify_proof as verify_proof
    from stabilitykit.report.plot import plot as plot
    from stabilitykit.run.forecast import forecast as forecast
    from stabilitykit.run.open import open_model as open_model
    from stabilitykit.run.profile import profile as profile
    from stabilitykit.searches.run import search as search
    from stabilitykit.sweeps.run import sweep as sweep
    from stabilitykit.trials.diagnose import diagnose as diagnose
    from stabilitykit.trials.training import diagnose_training as diagnose_training

_HOMES = {
    "FORMATS": "formats",
    "NumberFormat": "formats",
    "NumericalBreak": "guards.breaks",
    "Recording": "records",
    "Sampling": "models.subject",
    "StabilityGuard": "guards.processor",
    "Statistic": "recorder",
    "Where": "recorder",
    "bound": "bounds.examine",
    "build": "models.gemma",
    "chain": "diagnosis",
    "check": "gate.check",
    "compare": "diagnosis.compare",
    "describe": "recorder",
    "diagnose": "trials.diagnose",
    "diagnose_training": "trials.training",
    "forecast": "run.forecast",
    "generate": "models.gemma",
    "guard": "guards.guard",
    "load": "models.gemma",
    "open_checkpoint": "checkpoints",
    "open_model": "run.open",
    "plot": "report.plot",
    "profile": "run.profile",
    "record": "recorder",
    "repair": "remedies.repair",
    "search": "searches.run",
    "sweep": "sweeps.run",
    "verdict": "diagnosis",
    "verify": "remedies.verify",
    "verify_proof": "remedies.verify",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("stabilitykit")
    if name not in _HOMES:
        raise AttributeError(f"module 'stabilitykit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"stabilitykit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
