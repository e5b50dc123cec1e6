"""`record(model)`: the output of every module and the result of every operator, as one list of records.

    with record(model) as recording:
        logits = model(tokens)
    recording.first_break()

Forward hooks tell which module runs; an operator mode sees what no module returns: residual adds, attention scores,
gate · up. A tensor is measured the moment it exists, because the next operator may overwrite it. The model computes the
same bits with and without a recorder, and no hook outlives the block. (Only torch.linalg's svdvals, eigvalsh, cond and
nuclear norm, where no gradient is asked for, take another routine under any operator mode, and other last bits.) What
the recorder fails at becomes a note in the header; it does not end the pass. Nothing waits for a device: counts are
copied to the host while the pass goes on.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from stabilitykit.errors import MisuseError, SkippedStatements
from stabilitykit.formats import FORMATS, number_format
from stabilitykit.models import matmul as products
from stabilitykit.models.machine import machine, versions
from stabilitykit.recorder.claims import claim
from stabilitykit.recorder.copies import Copies
from stabilitykit.recorder.custom import Statistic
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.labels import Family, family_of
from stabilitykit.recorder.libraries import attention_of, checkpoint_of, library_versions
from stabilitykit.recorder.names import OUTSIDE
from stabilitykit.recorder.observe import DEFAULT_FORMATS, Observer, Options
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.repro.export import Export
from stabilitykit.recorder.repro.keep import Kept
from stabilitykit.recorder.session import Session
from stabilitykit.recorder.stopped import skipped
from stabilitykit.recorder.unseen import StopAtBreak
from stabilitykit.records import Header, Level, Record, Recording


@contextmanager
def record(
    model: nn.Module,
    *,
    level: Level = "operators",
    formats: Sequence[str] = DEFAULT_FORMATS,
    statistics: Sequence[Statistic] = (),
    position_peaks: bool = False,
    fused_softmax: bool = True,
    stop_at_break: bool = False,
    backward: bool = False,
    keep: dict[str, Tensor] | None = None,
    against: Mapping[str, Tensor] | None = None,
    matmul: str | None = None,
    watch: Sequence[tuple[str, int]] = (),
    token_text: Callable[[int], str] | None = None,
    redact: bool = False,
    keep_operands: bool = False,
    copies: Copies | None = None,
    compared: Sequence[Copies] = (),
    case: Mapping[str, Any] | None = None,
) -> Iterator[Recording]:
    """Records every forward pass of `model` inside the block; the recording is complete when the block ends.

    `level`: "layers" sees the outputs of the decoder layers and the model's direct children, "modules" those of
    every module, "operators" every operator too. `formats`: those for which exact counts are kept. `statistics` are
    added to those of every record, each with a column of its own: see `Statistic`. `position_peaks` keeps each
    position's amax. `fused_softmax`: a fused attention kernel runs as it is and keeps no probabilities, so its softmax
    statistics are recomputed in float32 from the queries and keys it was given. `stop_at_break` ends the block at the
    first break: `recording.stopped` is True then, and `SkippedStatements` is warned of where that left out more than
    the call of the model, such as an assignment of what it returns.

    `keep` is filled with copies of the modules' outputs and the residual sums by site, last step first;
    handed to another run of the same tokens as `against`, they become its records' `deviation`. `matmul`
    computes 16-bit matrix products in the block as `stabilitykit.models.matmul` does; without it arithmetic stays as
    it is. The header says which was in force.

    `copies` gets a copy of every tensor, as far as there is room for it; a later run of the same tokens in a wider
    dtype that is given it in `compared` is what they are compared with, and `Copies.told` has the deviations.

    On the meta device nothing is computed: such a recording says which tensors there would be, of what shape and in
    which dtype, and counts all their elements as masked.

    `watch` names single elements, by site and row-major index, whose values the header keeps as `watched`.
    `token_text` gives a token id's text; a model with a `tokenizer` that has `piece` needs none. `redact` keeps
    tokens out of the recording. `keep_operands` copies the operands of what breaks when it is judged, and of what
    absorbs it, 64 MiB at most, for the recording's `export_repro`; they are no part of its file. `case` goes into the
    header as it is.

    Each call of `model`, or of a module in it that holds the layers, is a step; what runs between two of them, such as
    a sampler, belongs to the first and has sites that begin with "outside". Rows and positions are followed from what
    enters the model: ids (arguments called so, such as `input_ids`, or else the first integer tensor of shape [L] or
    [B, L] that is called nothing else), embeddings and other floating [B, L, D], and the frames and patches that a
    convolution makes of sound and images. Where they cannot be followed, none is named. An exception raised in the
    block is kept as the header's `error` and passed on. Functions compiled by `torch.compile` run uncompiled inside
    the block.

    `backward` records gradients too: of every tensor that has a record, and of every parameter as its `grad` is after
    the pass, in the order in which autograd makes them, under sites that begin with "backward/". Of one that is not
    finite float64 tells why, unless autograd had packed away what it was made of. Each waits for its device once. The
    header's `case` gets the `loss_scale` by which the loss was multiplied last, unless it is given. Passes that make a
    graph of their own (`create_graph`) are left alone. Without `backward`, a backward pass that leaves gradients that
    are not finite is one record. Passes in other threads are left alone, and a model belongs to one recording at a
    time.

    Raises MisuseError for what is not a module, for an unknown level, format or matmul mode, for statistics whose names
    are taken, for a model that is being recorded already, or a part of it, and for a model or a module of it that went
    through `torch.compile`. Warns at the end of a block in which no part of the model was called, in which a statistic
    failed, or of which `stop_at_break` left statements out.
    """
    _check(model, level, formats, matmul)
    options = Options(
        level=level,
        formats=tuple(formats),
        position_peaks=position_peaks,
        fused_softmax=fused_softmax,
        stop_at_break=stop_at_break,
        backward=backward,
        keep_operands=keep_operands,
        keep=keep,
        against=against or {},
        watch=watch,
        statistics=statistics,
        copies=copies,
        compared=compared,
    )
    session = Session(model, options)
    recording = Recording(_header(model, session, case or {}))
    error: str | None = None
    missing: str | None = None
    try:
        with ExitStack() as stack:
            stack.enter_context(claim(model))
            if matmul is not None:
                stack.enter_context(products.matmul(matmul))
            recording.header = replace(recording.header, matmul=products.matmul_in_force())
            if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            session.attach(stack)
            yield recording
    except StopAtBreak as end:
        recording.header = replace(recording.header, stopped=True)
        missing = skipped(end)
    except Exception as raised:
        error = str(raised)
        raise
    finally:
        _finish(model, session, recording, token_text, redact=redact, error=error)
    if missing is not None:
        warnings.warn(missing, SkippedStatements, stacklevel=3)
    for failure in session.observer.custom.failures():
        warnings.warn(failure, stacklevel=3)
    if not session.starts and all(entry.module == OUTSIDE for entry in session.observer.entries):
        warnings.warn(
            "Nothing was recorded: the model was not called inside the block. Call the module that was passed to "
            "record(), or a part of it.",
            stacklevel=3,
        )


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside a recorded block: operators of an observer's own, which are none of the model's."""
    with _disable_current_modes():
        yield


def _check(model: nn.Module, level: str, formats: Sequence[str], matmul: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise MisuseError(
            f"record() expects a torch.nn.Module, got {type(model).__name__}. If it wraps a model, pass the module "
            "inside it."
        )
    if level not in get_args(Level):
        raise MisuseError(f"unknown level {level!r}; choose one of: {', '.join(get_args(Level))}")
    for name in formats:
        number_format(name)
    if matmul is not None:
        products.check_matmul(matmul)
    if any("_orig_mod" in m._modules or m.__dict__.get("_compiled_call_impl") is not None for m in model.modules()):
        raise MisuseError(
            "record() cannot see inside a compiled model. Pass the model from before torch.compile, which keeps it as "
            "`_orig_mod`, or load it again if model.compile() was called."
        )


def _header(model: nn.Module, session: Session, case: Mapping[str, Any]) -> Header:
    first = next(model.parameters(), torch.empty(0))
    parameter, attention = _floating(model), attention_of(model)
    return Header(
        checkpoint=checkpoint_of(model),
        sha256=getattr(model, "sha256", None),
        dtype="float32" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        device=str(first.device),
        level=session.options.level,
        backward=session.options.backward,
        matmul="native",
        formats=session.options.formats,
        statistics=session.observer.custom.units,
        rows=0,
        tokens=None,
        notes=tuple(getattr(model, "notes", ())),
        case=({} if attention is None else {"attention": attention}) | dict(case),
        versions=_versions() | library_versions(model),
        machine=machine(str(first.device)) | {"threads": torch.get_num_threads()},
    )


def _floating(model: nn.Module) -> nn.Parameter | None:
    """The first parameter that is no integer; quantised weights come before their scales."""
    return next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)


def _finish(
    model: nn.Module,
    session: Session,
    recording: Recording,
    piece: Callable[[int], str] | None,
    *,
    redact: bool,
    error: str | None,
) -> None:
    """Waits for what is on its way, and completes the recording."""
    observer = session.observer
    watched: list[tuple[str, int, float]] = []
    with session.unseen.guard("what was still on its way from the device"):  # what it said before is kept
        observer.settle()
        watched += [(site, index, float(element)) for site, index, element in observer.watched]
    step = session.places.step
    tokens = None if redact else _complete(session.steps.whole)
    if piece is None:
        piece = getattr(getattr(model, "tokenizer", None), "piece", None)
    texts = {} if redact or piece is None else _texts(sorted(session.steps.seen), piece)
    dtype = recording.header.dtype
    if _floating(model) is None:  # what it is given decides in which dtype it runs
        dtype = next((entry.form.dtype for entry in observer.entries if entry.form.dtype in FORMATS), dtype)
    header = recording.header = replace(
        recording.header,
        dtype=session.autocast or dtype,
        watched=tuple(watched),
        rows=step.rows or 0,
        tokens=tokens,
        token_texts=texts,
        starts=tuple(session.starts),
        lost_steps=tuple(sorted(session.lost_steps())),
        notes=(*recording.header.notes, *observer.custom.failures(), *session.unseen.notes()),
        error=error,
    )
    if session.gradients is not None and session.gradients.loss_scale is not None:
        header = recording.header = replace(header, case={"loss_scale": session.gradients.loss_scale} | header.case)
    family = family_of(model)
    operands: dict[int, Kept] = {}
    recording.records = lambda: _records(observer, header, family, operands, shows_tokens=not redact)
    if session.options.keep_operands:
        recording.repro = Export(operands)
    session.names.origins.forget()
    session.names.frames.clear()
    observer.calls.forget()
    if session.nodes is not None:
        session.nodes.forget()
    session.places.close()


def _complete(whole: Sequence[Sequence[int | None]] | None) -> tuple[tuple[int, ...], ...] | None:
    """Ids of whole sequences; None where some positions hold no token, or were not seen."""
    if not whole:
        return None
    rows = tuple(tuple(token for token in row if token is not None) for row in whole)
    return rows if all(len(row) == len(of) for row, of in zip(rows, whole, strict=True)) else None


def _records(
    observer: Observer, header: Header, family: Family | None, operands: dict[int, Kept], *, shows_tokens: bool
) -> list[Record]:
    """The records; `operands` gets those that were kept, by the record's order."""
    entries = observer.entries

    def site_of(origin: Origin) -> str:
        if origin.trail is not None:
            return origin.trail.site
        return origin.name if origin.entry is None else entries[origin.entry].site

    whole: list[Entry] = []
    for number, entry in enumerate(entries):
        whole += observer.before.get(number, ())
        if entry.row is not None:
            entry.decide()
            whole.append(entry)
    whole += [entry for number, late in observer.before.items() if number >= len(entries) for entry in late]
    again = {
        id(entry)
        for entry in whole
        if entry.repeats is not None and entry.statistics == entries[entry.repeats].statistics
    }
    kept = [entry for entry in whole if id(entry) not in again]
    operands |= {order: entry.operands for order, entry in enumerate(kept) if entry.operands is not None}
    return [
        entry.record(order, header, family=family, shows_tokens=shows_tokens, site_of=site_of)
        for order, entry in enumerate(kept)
    ]


@cache
def _versions() -> dict[str, str]:
    return versions() | {"numpy": np.__version__}


def _texts(tokens: Sequence[int], piece: Callable[[int], str]) -> dict[int, str]:
    """Ids without a text stay so: this runs while an exception may be on its way, and must not replace it."""
    texts = {}
    for token in tokens:
        with suppress(Exception):
            texts[token] = piece(token)
    return texts
