"""What is said of one run, for tests that look at single answers."""

import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.diagnosis import document
from truth.score import false_sums

IDS = torch.arange(10, 16)[None]
COARSE = ("modules", "layers")


def told(
    model: nn.Module, run: Callable[[Any], Any], level: Any = "operators", *, grad: bool = False, raises: bool = False
) -> dict[str, Any]:
    """The document of a recorded run; what the run itself raises is left aside where `raises` says that it does."""
    torch.manual_seed(0)
    mode: AbstractContextManager[Any] = nullcontext() if grad else torch.inference_mode()
    with warnings.catch_warnings(), suppress(RuntimeError, ValueError) if raises else nullcontext():
        warnings.simplefilter("ignore")
        with mode, sk.record(model, level=level) as recording:
            run(model)
    said: dict[str, Any] = json.loads(json.dumps(document(recording)))
    assert not false_sums(said["verdict"]), said["verdict"]
    return said


def first(said: dict[str, Any]) -> dict[str, Any]:
    assert said["first_break"] is not None, said["verdict"]
    found: dict[str, Any] = said["first_break"]
    return found


def silent(said: dict[str, Any]) -> None:
    """Nothing is said to be wrong."""
    assert said["first_break"] is None, said["verdict"]
    assert said["cause"] is None


def does_not_exclude(said: dict[str, Any]) -> None:
    """Where only modules are seen and all of them are finite: what one of them does inside is left open."""
    assert said["first_break"] is None
    assert "cannot be excluded" in said["verdict"], said["verdict"]


def unresolved(said: dict[str, Any], site: str) -> None:
    """Where only modules are seen: which one is lost first, and no claim of how."""
    found = first(said)
    assert (found["site"], found["kind"]) == (site, "unresolved"), said["verdict"]
    for claim in ("check what is passed", "scale the residual", "starts with", "wider range"):
        assert claim not in said["verdict"].lower(), said["verdict"]


def logits(m: Any) -> Tensor:
    return m(IDS).logits


def says(said: dict[str, Any], *words: str) -> None:
    for word in words:
        assert word.lower() in said["verdict"].lower(), (word, said["verdict"])


def says_not(said: dict[str, Any], *words: str) -> None:
    for word in words:
        assert word.lower() not in said["verdict"].lower(), (word, said["verdict"])
