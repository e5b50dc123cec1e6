"""Rows of statistics on their way from a device, and what waits for them.

On a CPU a tensor's row is there as soon as the tensor is measured. On another device it is computed later, and to look
at it at once would make the device wait for the host after every operator. So rows cross in groups, while the pass goes
on, and what depends on them is done in the order in which the tensors were made. Until then the tensors are kept, so
that a break can be looked at closely.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GROUP = 64  # rows that cross at once
_HELD = 2**33  # bytes of tensors that are kept alive; past them the host waits for the oldest, and the device does not

Row = NDArray[np.float64]


class Transfer(Protocol):
    """Numbers that are being brought to the host."""

    def arrived(self) -> bool:
        """Without waiting."""
        ...

    def wait(self) -> Row: ...


def transfer(numbers: Tensor) -> Transfer:
    return _FromCuda(numbers) if numbers.is_cuda else _AtOnce(numbers)


class _FromCuda:
    def __init__(self, numbers: Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record(torch.cuda.current_stream(numbers.device))

    def arrived(self) -> bool:
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Row:
        self._done.synchronize()
        return self._host.numpy()


class _AtOnce:
    """For devices on which nothing crosses by itself."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers

    def arrived(self) -> bool:
        return False

    def wait(self) -> Row:
        return self._numbers.numpy(force=True)


@dataclass(slots=True, eq=False)
class _Waiting:
    use: Callable[[Row], None] | None  # of a row that has to come
    action: Callable[[], None] | None
    row: Tensor | None = None
    value: Row | None = None
    storages: tuple[int, ...] = ()
    bytes: int = 0

    @property
    def ready(self) -> bool:
        return self.use is None or self.value is not None


class Pending:
    """What waits for rows, in order. While there is none of it, everything is done at once."""

    def __init__(self) -> None:
        self._queue: deque[_Waiting] = deque()
        self._unsent: list[_Waiting] = []
        self._sent: deque[tuple[Transfer, list[_Waiting]]] = deque()
        self._storages: Counter[int] = Counter()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._queue)

    def after(self, row: Tensor, use: Callable[[Row], None], keeping: Sequence[Tensor]) -> None:
        """Calls `use` with the row once it is on the host. `keeping` are the tensors that `use` will look at."""
        storages = tuple({tensor.untyped_storage()._cdata for tensor in keeping})
        size = sum(tensor.nbytes for tensor in keeping[:1])  # the others were somebody's first before
        self._queue.append(_Waiting(use, None, row, storages=storages, bytes=size))
        self._unsent.append(self._queue[-1])
        self._storages.update(storages)
        self._bytes += size
        if len(self._unsent) >= _GROUP:
            self._send()
        self.poll()
        while self._bytes > _HELD:
            self._send()
            self._receive()

    def do(self, action: Callable[[], None]) -> None:
        """`action` after everything that waits."""
        if self._queue:
            self._queue.append(_Waiting(None, action))
        else:
            action()

    def about_to_write(self, tensor: Tensor) -> None:
        """Before an operator writes into memory that something waits to look at: that is done first."""
        storage = tensor.untyped_storage()._cdata
        while self._storages[storage]:
            self._send()
            self._receive()

    def poll(self) -> None:
        """Does what can be done without waiting."""
        while self._sent and self._sent[0][0].arrived():
            self._receive()

    def settle(self) -> None:
        """Waits for everything."""
        self._send()
        while self._sent:
            self._receive()

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        devices: dict[torch.device, list[_Waiting]] = {}
        for waiting in unsent:
            assert waiting.row is not None
            devices.setdefault(waiting.row.device, []).append(waiting)
        for group in devices.values():
            rows = [waiting.row for waiting in group if waiting.row is not None]
            self._sent.append((transfer(torch.cat(rows)), group))

    def _receive(self) -> None:
        arriving, group = self._sent.popleft()
        numbers, at = arriving.wait(), 0
        for waiting in group:
            assert waiting.row is not None
            width = len(waiting.row)
            waiting.value, waiting.row = numbers[at : at + width], None
            at += width
        while self._queue and self._queue[0].ready:
            waiting = self._queue.popleft()
            self._storages.subtract(waiting.storages)
            self._bytes -= waiting.bytes
            if waiting.use is not None and waiting.value is not None:
                waiting.use(waiting.value)
            elif waiting.action is not None:
                waiting.action()
        self._storages += Counter()  # forgets those of which none is left
