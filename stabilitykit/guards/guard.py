"""`guard(model)`: every step of a model watched, row by row, at the cost of one small reduction a tensor."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from stabilitykit.choices import check_choice
from stabilitykit.errors import MisuseError
from stabilitykit.guards.attach import Attached
from stabilitykit.guards.breaks import NumericalBreak, RowBreak
from stabilitykit.guards.claims import claim, release
from stabilitykit.guards.generation import Chosen, in_generate, in_own_sampler
from stabilitykit.guards.judge import Judge, Outcome, Settings
from stabilitykit.guards.log import LOGGER, tell_failure
from stabilitykit.guards.metrics import Metrics
from stabilitykit.guards.places import Places, logits_of, places_of, uncompiled
from stabilitykit.guards.processor import ended
from stabilitykit.guards.sequences import ByCache, Sequences
from stabilitykit.guards.step import Step
from stabilitykit.guards.watch import Part, Watch, Watched
from stabilitykit.guards.wide import WideDtype, WideModel, check_given, put
from stabilitykit.recorder.pending import transfer

OnBreak = Literal["stop", "raise", "warn", "retry"]
MOST_BREAKS = 1000
"""So many of the last breaks are kept."""


@dataclass(slots=True, eq=False)
class _Running:
    """The step that is running in a thread."""

    step: Step
    sequences: Sequences
    watched: Watched | None


class _Thread(threading.local):
    """What belongs to one thread that calls the model."""

    running: _Running | None = None
    last: Sequences | None = None
    chosen: Chosen | None = None
    beams: int = 0
    off: bool = False


class Guard:
    """A model's guard, made by `guard`: a context manager, or on from `install` to `remove`."""

    def __init__(self, model: nn.Module, settings: Settings, watch: Watch, every: int, wide: WideModel) -> None:
        self.model = model
        self._inner = uncompiled(model)
        self._own: frozenset[int] = frozenset()
        self._watch, self._every = watch, every
        self._attached = Attached()
        wide.strip = self._attached.strip
        self._wide = wide
        self._judge = Judge(self._inner, settings, wide, self._kept)
        self._metrics = settings.metrics
        self._breaks: deque[RowBreak] = deque(maxlen=MOST_BREAKS)
        self._sequences = ByCache()
        self._thread = _Thread()
        self._installed = False
        self._told = False
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        return self  # a copy of the model has hooks that lead here, until they are taken off

    def __reduce__(self) -> NoReturn:
        raise MisuseError(
            "A model cannot be pickled while it has a guard, which is no part of it: guard.remove() first."
        )

    def __enter__(self) -> "Guard":
        return self.install()

    def __exit__(self, *raised: object) -> None:
        self.remove()

    def install(self) -> "Guard":
        """Puts the guard on its model. Raises MisuseError where that, or a part of it, has one already, and where there
        are no layers whose residual could be watched, or `wide` is another model.
        """
        claim(self._inner)
        self._installed = True
        try:
            self._put()
        except BaseException:
            self.remove()
            raise
        return self

    def _put(self) -> None:
        places = places_of(self._inner)
        self._refuse(places)
        self._own = frozenset(map(id, places.wholes.values()))
        for path, whole in places.wholes.items():
            self._attached.before(whole, partial(self._enter, path))
            self._attached.after(whole, self._leave, if_raised=True)
            if whole._compiled_call_impl is not None:
                outside = self.outside(path, whole, whole._compiled_call_impl)
                self._attached.attribute(whole, "_compiled_call_impl", outside)
        if self.model is not self._inner:
            self._attached.before(self.model, partial(self._enter, ""))
            self._attached.after(self.model, self._leave, if_raised=True)
        watched: list[tuple[Part, str, nn.Module]] = []
        if self._watch == "residual":
            watched += [("residual", site, layer) for site, layer in places.layers]
        if places.norm is not None:
            watched.append(("final norm", *places.norm))
        for part, site, module in watched:
            self._attached.after(module, partial(self._look, part, site))
        in_generate(self._attached, self._inner, self)
        in_own_sampler(self._attached, self._inner, self)

    def _refuse(self, places: Places) -> None:
        """Raises MisuseError for what this model does not have."""
        compiled = self.model is not self._inner or any(
            one._compiled_call_impl is not None for one in places.wholes.values()
        )
        if self._watch == "residual" and (compiled or not places.layers):
            why = "is compiled, so that what its layers return is not seen" if compiled else "has no list of layers"
            raise MisuseError(
                f"watch='residual' looks at what every layer returns, and this {type(self._inner).__name__} {why}. Use "
                "watch='logits'" + (", or guard the model without compiling it." if compiled else ".")
            )
        if self._wide.given:
            wide = self._wide.of(self._inner)
            lacking = [
                path for path in places.wholes if path and path not in {name for name, _ in wide.named_modules()}
            ]
            if lacking:
                raise MisuseError(
                    f"wide has to be the same model in a wider dtype, but this {type(wide).__name__} has no "
                    f"{lacking[0]!r}, which {type(self._inner).__name__} has."
                )

    def remove(self) -> None:
        """Takes it off: no hook is left, and weights that were made for retries are freed. `breaks` stay."""
        if not self._installed:
            return
        try:
            self._settle()
        finally:
            self._take_off()

    def _take_off(self) -> None:
        self._attached.remove()
        release(self._inner)
        self._sequences.clear()
        self._thread = _Thread()
        self._wide.drop()
        self._installed = False

    @property
    def breaks(self) -> list[RowBreak]:
        """The last 1,000 breaks in order, of all steps since the guard was made, or since `take`."""
        self._settle()
        with self._lock:
            return list(self._breaks)

    def take(self) -> list[RowBreak]:
        """The breaks so far, which are forgotten: what a server asks after each batch."""
        found = self.breaks
        with self._lock:
            for _ in found:
                self._breaks.popleft()
        return found

    @property
    def stopped(self) -> tuple[int, ...]:
        """Rows of the batch that ran last in this thread that were ended, in order; for loops of one's own."""
        return () if self.last is None else tuple(sorted(self.last.ended))

    def end(self, scores: Tensor, eos: int) -> Tensor:
        """`scores` [B, V] with `eos` as the only choice of rows that were stopped; the others keep their bits.

        For loops of one's own; `generate` and the kit's sampler do it themselves.
        """
        return ended(scores, self.stopped, eos) if self.stopped else scores

    # What hooks and processors call

    @property
    def last(self) -> Sequences | None:
        return self._thread.last

    @property
    def ends(self) -> bool:
        return self._judge.ends

    def chosen(self, chosen: Chosen) -> None:
        """After a call's logits processors. Where nothing has to be decided at once, the next step's wait serves."""
        self._thread.chosen = chosen
        if self._judge.decides_at_once:
            self._settle()

    @contextmanager
    def generating(self) -> Iterator[None]:
        thread = self._thread
        thread.beams, thread.last = 1, None
        try:
            yield
        finally:
            thread.beams = 0

    def beams(self, count: int) -> None:
        self._thread.beams = count

    def outside(self, path: str, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._enter(path, module, args, kwargs)
            output = None
            try:
                output = call(*args, **kwargs)
            finally:
                changed = self._leave(module, args, kwargs, output)
            return output if changed is None else changed

        return watched

    def _settle(self) -> None:
        """Waits for the scores that are on their way, and reports what they show."""
        chosen, self._thread.chosen = self._thread.chosen, None
        if chosen is not None:
            self._of_scores(chosen, None)

    def _of_scores(self, chosen: Chosen, kinds: Any) -> None:
        """Reports scores that nothing can be drawn from; `kinds` are on the host, or else are waited for."""
        try:
            kinds = transfer(chosen.kinds).wait() if kinds is None else kinds
            self._judge.of_scores(chosen.breaks([float(kind) for kind in kinds]), chosen.sequences)
        except NumericalBreak:
            raise
        except Exception as error:
            if error is self._judge.raised:
                raise  # the user's own
            tell_failure("the scores of logits processors", error)

    def _kept(self, broke: RowBreak) -> None:
        with self._lock:
            self._breaks.append(broke)

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled call is watched from outside
        thread, module = self._thread, uncompiled(module)
        if thread.off or (thread.running is not None and thread.running.step.module is not module):
            return
        if id(module) not in self._own:
            return  # of a copy of the model, to which the hooks came along
        thread.running = thread.last = None  # whatever was interrupted
        try:
            step = Step.of(path, module, args, kwargs)
            sequences = self._sequences.of(step.cache, step.rows, step.new, thread.beams)
            look = sequences.steps % self._every == 0 or step.new > 1
            thread.running = _Running(step, sequences, Watched() if look else None)
        except Exception as error:
            tell_failure("what a step was given", error)

    def _look(
        self, part: Part, site: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if torch.compiler.is_compiling():
            return
        running = self._thread.running
        if running is None or running.watched is None or self._thread.off:
            return
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim > 1:
            try:
                running.watched.look(part, site, tensor, running.step.real)
            except Exception as error:
                tell_failure(f"the output of {site}", error)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        thread, module = self._thread, uncompiled(module)
        running = thread.running
        if thread.off or running is None or running.step.module is not module:
            return None
        thread.running = None
        if output is None:  # it raised
            return None
        thread.off = True  # what runs from here on is the guard's own
        try:
            return self._judged(running, output)
        except NumericalBreak:
            raise
        except Exception as error:
            if error is self._judge.raised:
                raise  # the user's own
            tell_failure("a step", error)
            return None
        finally:
            thread.off = False

    def _judged(self, running: _Running, output: Any) -> Any:
        """What the model's caller gets instead of `output`, None for itself."""
        step, sequences = running.step, running.sequences
        made = getattr(output, "past_key_values", None) if step.cache is None else step.cache
        self._thread.last = sequences
        found = Outcome(step, sequences, sequences.steps, output, logits_of(output), [], self._thread.beams)
        sequences.steps += 1
        sequences.fed += step.new
        if made is not None:
            self._sequences.keep(made, sequences)
        self._in_wide(found)
        if running.watched is not None:
            if found.logits is not None:
                running.watched.look("logits", "logits", found.logits, step.real)
            self._read(running.watched, found)
        return found.answer if found.changed else None

    def _in_wide(self, found: Outcome) -> None:
        """The step of the rows that are in the wider dtype."""
        for group in tuple(found.sequences.wide):
            if found.logits is None or found.sequences.ended.issuperset(group.rows):
                continue
            try:
                module = self._wide.of(self._inner).get_submodule(found.step.path)
                again, logits = group.step(found.step, module, self._wide.dtype)
                found.logits, found.changed = put(found.logits, group.rows, logits), True
                found.wide.append((group, again))
            except Exception as error:
                self._judge.parted(found, group, error)

    def _read(self, watched: Watched, found: Outcome) -> None:
        """The one wait of a step, and what follows from it."""
        chosen, self._thread.chosen = self._thread.chosen, None
        if chosen is not None:
            watched.add("scores", "scores", chosen.kinds)
        looked = watched.read(found.step.rows)
        if chosen is not None:
            scores = [one.largest for one in looked if one.part == "scores"]
            self._of_scores(chosen, scores[0] if scores else None)  # none of a batch of another size
        looked = [one for one in looked if one.part != "scores"]
        if not looked:
            self._tell_nothing()
            return
        headroom = self._judge.headroom(found, looked)
        for sink in self._metrics:
            sink.stepped(headroom)
        self._judge.absorbed(found, looked)
        self._judge.broken(found, looked)

    def _tell_nothing(self) -> None:
        if not self._told:
            self._told = True
            LOGGER.warning(
                "%s returns no logits and has no final norm with a number for each row: nothing of it is watched",
                type(self._inner).__name__,
            )


def guard(
    model: nn.Module,
    on_break: OnBreak | Callable[[Sequence[RowBreak]], str | None] = "stop",
    watch: Watch = "logits",
    every: int = 1,
    *,
    retry_in: WideDtype = "float32",
    wide: nn.Module | None = None,
    headroom: float | None = None,
    metrics: Sequence[Metrics] = (),
    token_text: Callable[[int], str] | None = None,
    redact: bool = False,
) -> Guard:
    """Watches every step of `model`, the kit's or one of transformers', and names the row of a batch that breaks.

        with guard(model) as g:
            answers = model.generate(**inputs)
        for broke in g.breaks:
            print(broke)

    The guard is on inside the block, or from `install()` to `remove()`. It looks at the largest magnitude of each row
    in the final norm and the logits, with `watch="residual"` in what every layer returns too, and waits for the device
    once a step, when the step ends. Padding of a prompt, as the mask tells it, is left out. A row breaks where a logit
    is NaN or +inf, or all of a position are -inf; of a model without logits the final norm decides. Logits keep their
    bits, but for those of retried rows, and no NaN is replaced by a number.

    A step in which a row broke is repeated under the recorder, on a copy of its cache as it was before, which names
    site, kind and chain. `on_break` says what is done then:

    - "stop" ends the row alone, in `generate` (greedy or sampling, not beams) and the kit's sampler: from there on
      `<eos>` is its only choice, which stands for no score of the model. The others go on.
    - "raise" raises NumericalBreak before a token is drawn.
    - "warn" only logs it.
    - "retry" repeats the row's step in `retry_in`, float32 or bfloat16, with a cache of its own, and carries it on
      there to its end; logits come in the dtype that holds both. Weights are copied at the first retry, or are those of
      `wide`. Where weights, input or cache are to blame, so that any dtype fails, it says so, and the row is ended.
    - a callable is given the breaks of a step, and returns one of these names, or None for "warn". What it raises
      is passed on.

    A residual stream that was not finite although the logits are is reported with `watch="residual"`, not acted on.
    `every` looks at each n-th step only, and at every prompt. `headroom` warns, in bits, once a site and batch, where
    less is left. `metrics` are told of steps, breaks and retries. `token_text` gives a token's text; a model with a
    tokenizer of the kit needs none. `redact` keeps tokens out of everything. What the guard fails at is logged, and
    ends no pass.

    Raises MisuseError for what is no module, unknown settings and a `wide` that is no wider; `install` does where the
    model has a guard or lacks what is to be watched.
    """
    if not isinstance(model, nn.Module):
        raise MisuseError(f"guard() expects a torch.nn.Module, got {type(model).__name__}.")
    if not callable(on_break):
        check_choice("on_break", on_break, get_args(OnBreak))
    check_choice("watch", watch, get_args(Watch))
    check_choice("retry_in", retry_in, get_args(WideDtype))
    if wide is not None:
        check_given(wide, model)
    if every < 1:
        raise MisuseError(f"every must be at least 1 step, got {every}.")
    if token_text is None:
        token_text = getattr(getattr(model, "tokenizer", None), "piece", None)
    settings = Settings(
        on_break=on_break, headroom=headroom, metrics=tuple(metrics), token_text=token_text, redact=redact
    )
    return Guard(model, settings, watch, every, WideModel(retry_in, wide))
