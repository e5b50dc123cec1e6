"""The process that runs cases. A sweep starts it, names one case a line, and reads what becomes of it.

A process of its own, because a case that runs out of memory may be killed, and takes its process with it. It ends as
soon as nobody holds the other end of its input, so a sweep that is killed leaves nothing running.
"""

import gc
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stabilitykit.checkpoints.config import released
from stabilitykit.models.gemma.footprint import footprint
from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.models.subject import Sampling, Subject
from stabilitykit.records.sweep import Case, Failure, Footprint, Results, Shortage
from stabilitykit.run.case import Reference, run_case, run_reference, stage
from stabilitykit.run.every_length import every_length
from stabilitykit.run.prefill import measure, starve
from stabilitykit.sweeps.model import SweptModel, open_swept
from stabilitykit.sweeps.plan import case_tokens

Report = Callable[[str, int, int], None]


@dataclass(slots=True)
class Runner:
    """Runs cases one after another; what the next one can use again is kept."""

    results: Results
    texts: Path
    model: SweptModel
    # Of those in float32 and of the others, the last one each: a reference, and what is compared with it.
    _models: dict[bool, tuple[str, Subject]] = field(default_factory=dict)
    _reference: tuple[str, Reference] | None = None

    def run(self, case: Case, report: Report) -> None:
        """Runs the case and writes its result. Any exception is the case's own."""
        match case.kind:
            case "run":
                self._run(case, report)
            case "lengths":
                self._lengths(case, report)
            case "memory" | "shortage" | "footprint":
                self.results.write(case, self._memory(case))

    def _run(self, case: Case, report: Report) -> None:
        settings = case.settings
        tokens = case_tokens(case, self.model, self.texts)
        reference = None
        if settings["dtype"] != "float32" and settings["level"] != "layers" and self._has_reference(case):
            reference = self._reference_for(case, tokens, report)
        run = run_case(
            self._model(case, report),
            tokens,
            sampling=Sampling(temperature=settings["temperature"] or None, seed=settings["seed"]),
            level=settings["level"],
            matmul=_matmul(case),
            position_peaks=True,
            every_logit=True,
            reference=reference,
            facts={"prompt": settings["prompt"]},
            progress=report,
        )
        run.recording.save(self.results.path(case))

    def _lengths(self, case: Case, report: Report) -> None:
        found = every_length(
            self._model(case, report),
            case_tokens(case, self.model, self.texts),
            checks=case.settings["checks"],
            level=case.settings["level"],
            matmul=_matmul(case),
            case={"prompt": case.settings["prompt"], "rescale": case.settings["rescale"]},
            progress=report,
        )
        found.save(self.results.path(case))

    def _memory(self, case: Case) -> Footprint | Shortage:
        settings = case.settings
        where = settings["dtype"], settings["length"], settings["device"]
        if case.kind == "footprint":
            return footprint(released(settings["model"]), where[0], where[1], device=where[2])
        self.drop()  # another process needs the room
        if case.kind == "shortage":
            return starve(self.results.plan.checkpoint, *where, settings["room"])
        return measure(self.results.plan.checkpoint, *where)

    def drop(self) -> None:
        """Lets go of models and references."""
        self._models.clear()
        self._reference = None
        gc.collect()

    def _has_reference(self, case: Case) -> bool:
        wanted = _without(case, "dtype")
        return any(
            other.settings["dtype"] == "float32" and _without(other, "dtype") == wanted
            for other in self.results.plan.cases
            if other.kind == "run"
        )

    def _reference_for(self, case: Case, tokens: list[int], report: Report) -> Reference:
        key = json.dumps(_without(case, "dtype"), sort_keys=True)
        if self._reference is None or self._reference[0] != key:
            self._reference = None
            wide = Case(kind="run", settings=case.settings | {"dtype": "float32"})
            self._reference = key, run_reference(self._model(wide, report), tokens)
        return self._reference[1]

    def _model(self, case: Case, report: Report) -> Subject:
        settings = case.settings
        key = json.dumps([settings[name] for name in ("dtype", "rescale", "rounding", "device")])
        wide = settings["dtype"] == "float32"
        if wide not in self._models or self._models[wide][0] != key:
            self._models.pop(wide, None)
            self._models[wide] = (
                key,
                self.model.open(settings, stage(f"{settings['dtype']}: preparing weights", report)),
            )
        return self._models[wide][1]


def _matmul(case: Case) -> str:
    settings = case.settings
    chosen: str = settings["matmul"]
    return preferred_matmul(settings["dtype"], settings["device"]) if chosen == "auto" else chosen


def _without(case: Case, *names: str) -> dict[str, Any]:
    return {name: value for name, value in case.settings.items() if name not in names}


def failure_of(error: Exception) -> Failure:
    """What to record of a case that raised."""
    out_of_memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(
        error
    )
    lines = str(error).splitlines()
    return Failure(
        kind="out of memory" if out_of_memory else "raised",
        reason=f"{type(error).__name__}: {lines[0] if lines else 'no message'}",
    )


def main(folder: Path, texts: Path) -> None:
    """Reads case ids from standard input; writes one JSON document a line to standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer

    def answer(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    asked: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(line.strip())
        os._exit(0)  # whoever asked is gone

    threading.Thread(target=listen, daemon=True).start()
    results = Results.open(folder)
    runner = Runner(results, texts, open_swept(results.plan.checkpoint))
    cases = {case.id: case for case in results.plan.cases}
    answer(ready=True)
    while True:
        case = cases[asked.get()]
        try:
            runner.run(case, lambda what, done, total: answer(what=what, done=done, total=total))
        except Exception as error:  # whatever it is, the other cases go on
            failure = failure_of(error)
            runner.drop()
            answer(failed=failure.kind, reason=failure.reason)
        else:
            answer(finished=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
