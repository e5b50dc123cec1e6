"""`FILE.py:make`: a failure that a file of the user's describes, built anew in each dtype.

    def make(dtype):  # a torch.dtype
        model = AutoModelForCausalLM.from_pretrained("my-model", dtype=dtype)
        return model, {"input_ids": torch.tensor([[2, 9259, 1902]])}

So whatever runs can be run again in another dtype: quantised weights, merged adapters, caches, code of one's own. What
`make` returns is run as it is; the float32 run is the reference.
"""

import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from stabilitykit.errors import MisuseError
from stabilitykit.models.devices import parse_dtype
from stabilitykit.report.own_section import load
from stabilitykit.trials.columns import Columns
from stabilitykit.trials.minimise import Tokens
from stabilitykit.trials.reproduction import called, dtype_of, same_draws

_SAMPLE = 64  # elements of a weight that are compared between dtypes
_APART = 0.1  # of their norm; rounding to bfloat16 changes 0.004


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function in a Python file of the user's, which is the code of whoever wrote it and runs with their rights."""

    path: Path
    name: str
    function: Callable[..., Any]

    @classmethod
    def load(cls, what: str) -> "UserFunction":
        """Runs FILE.py of "FILE.py:make", with its folder importable as for `python FILE.py`, and finds the function.

        Raises MisuseError, in one sentence with the line, for whatever the file raises, and where there is no such file
        or function.
        """
        place, colon, name = what.rpartition(":")
        if not colon or not name.isidentifier():
            raise MisuseError(f"A function of a file is named FILE.py:make; got {what!r}. Add a colon and its name.")
        path = Path(place)
        if not path.is_file():
            raise MisuseError(f"FILE.py:{name} names a Python file to run, and {place!r} is none. Check the path.")
        with _usable(path, "it is run"):
            module = load(path)
        function = getattr(module, name, None)
        if not callable(function):
            own = sorted(
                key
                for key, value in vars(module).items()
                if callable(value) and getattr(value, "__module__", None) == module.__name__
            )
            raise MisuseError(
                f"{path} must define {name}(dtype); "
                + (f"its {name} is {type(function).__name__}." if hasattr(module, name) else "it does not.")
                + (f" It defines {', '.join(own)}." if own else " It defines no function.")
            )
        return cls(path, name, function)

    def __call__(self, dtype: torch.dtype) -> Any:
        """What the function returns: each time from the same seeds, while the caller's random numbers stay.

        Raises MisuseError, in one sentence with the line, for whatever it raises.
        """
        with _seeded(), self.usable(f"{self.name}({dtype}) is called"):
            return self.function(dtype)

    def usable(self, what: str) -> Any:
        """A context in which the file's folder is importable, and what is raised becomes a MisuseError."""
        return _usable(self.path, what)


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers begin at the same place, and go on after the block as if nothing had been drawn."""
    with same_draws():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        yield


@contextmanager
def importable(path: Path) -> Iterator[None]:
    """Inside the block modules are looked for in the folder of `path` first."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _usable(path: Path, what: str) -> Iterator[None]:
    with importable(path):
        try:
            yield
        except (Exception, SystemExit) as error:
            raise MisuseError(_told(path, what, error)) from None


def _told(path: Path, what: str, error: BaseException) -> str:
    """The error and the line of the file, or else of another one, where it was raised."""
    said = str(error).strip().partition("\n")[0][:300]
    kind = type(error).__name__ + (f": {said}" if said else "")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}."
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(path)]
    if own:
        return f"{path}, line {own[-1].lineno}, when {what}: {kind.rstrip('.')}."
    return f"{path}, when {what}: {kind.rstrip('.')}."


@dataclass(frozen=True, slots=True)
class _Made:
    """How a model that was made is run."""

    method: str
    kwargs: Mapping[str, Any]


@dataclass(slots=True, eq=False)
class FromFile:
    """What `make` of a file describes. `notes` grow while models are made."""

    make: UserFunction
    dtype: str
    matmul: str | None = None
    source: str | None = None  # nothing that another command could open
    grad: bool = False
    text: Callable[[int], str] | None = None
    _notes: list[str] = field(default_factory=list)
    _made: "WeakKeyDictionary[nn.Module, _Made]" = field(default_factory=WeakKeyDictionary)
    _samples: dict[str, Tensor] = field(default_factory=dict)
    _first: nn.Module | None = None
    _columns: Columns | None = None
    _kept: tuple[Sequence[int], Sequence[int]] | None = None  # rows and columns of the arguments

    @classmethod
    def load(cls, what: str, dtype: str = "float16", matmul: str | None = None) -> "FromFile":
        """Loads the file and makes the model in `dtype`. Raises MisuseError for what is wrong with either."""
        parse_dtype(dtype)
        made = cls(UserFunction.load(what), dtype, matmul)
        made._first = made.model(dtype)
        made._columns = Columns.of((), made._made[made._first].kwargs)
        return made

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @property
    def tokens(self) -> Tokens:
        """Empty where no token ids are among the arguments."""
        return () if self._columns is None else self._columns.tokens

    def in_dtype(self, dtype: str) -> str:
        return f"{self.make.name}(torch.{dtype})"

    def model(self, dtype: str) -> nn.Module:
        first, self._first = self._first, None
        if first is not None and dtype == self.dtype:
            return first
        torch_dtype = getattr(torch, dtype)
        model, made = _checked(self.make, self.make(torch_dtype))
        self._made[model] = made
        self._look(model, dtype)
        return model

    def run(self, model: nn.Module) -> Any:
        made = self._made[model]
        kwargs = made.kwargs
        if self._kept is not None:
            columns = Columns.of((), kwargs)
            assert columns is not None
            _, kwargs = columns.kept(*self._kept)
        with _seeded(), importable(self.make.path):
            return called(model, made.method, (), kwargs)(model)

    def with_columns(self, rows: Sequence[int], columns: Sequence[int]) -> "FromFile":
        return replace(self, _kept=(rows, columns))

    def _look(self, model: nn.Module, dtype: str) -> None:
        """Notes what makes a comparison of dtypes worthless."""
        own, name = dtype_of(model), self.make.name
        if own != dtype and any(one.is_floating_point() and one.element_size() > 1 for one in model.parameters()):
            self._note(
                f"what {name}(torch.{dtype}) returned is a model in {own}: it does not follow the dtype it is given"
            )
        for key, sample in _samples(model).items():
            before = self._samples.setdefault(key, sample)
            fits = before.shape == sample.shape and bool(before.isfinite().all() and sample.isfinite().all())
            if fits and float((before - sample).norm()) > _APART * float(before.norm()):
                self._note(
                    f"{name}(torch.{dtype}) made other weights than {name}(torch.{self.dtype}), {key} among them, so "
                    "that the two cannot be compared: draw random weights in float32 and cast them, or load saved ones"
                )
                return

    def _note(self, what: str) -> None:
        if what not in self._notes:
            self._notes.append(what)


def _checked(make: UserFunction, returned: Any) -> tuple[nn.Module, _Made]:
    """The model, and how it is run. Raises MisuseError for whatever else was returned."""
    invariant = (
        f"{make.name}(dtype) of {make.path} must return (model, kwargs): a torch.nn.Module, or a method of one such as "
        "model.generate, and a dict of what it is called with by name"
    )
    if not isinstance(returned, tuple) or len(returned) != 2:
        what = f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__
        is_step = isinstance(returned, tuple) and len(returned) == 4
        tip = "For a training step add --backward" if is_step else "Write `return model, {'input_ids': ids}`"
        raise MisuseError(f"{invariant}; it returned {what}. {tip}.")
    call, kwargs = returned
    model = getattr(call, "__self__", call)
    if not isinstance(model, nn.Module):
        raise MisuseError(f"{invariant}; its first value is {type(call).__name__}. Return the model itself.")
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise MisuseError(f"{invariant}; its second value is {type(kwargs).__name__}. Name the arguments in a dict.")
    return model, _Made("__call__" if model is call else call.__name__, dict(kwargs))


def _samples(model: nn.Module) -> dict[str, Tensor]:
    """Some elements of each floating weight, evenly spaced, in float32."""
    return {
        name: one.detach().reshape(-1)[:: max(1, one.numel() // _SAMPLE)].float().cpu()
        for name, one in model.named_parameters()
        if one.is_floating_point() and one.element_size() > 1 and not one.is_meta
    }
