"""Running what is missing of an experiment, case by case, so that nothing finished is ever lost or done twice."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stabilitykit.errors import MisuseError, StabilityKitError
from stabilitykit.records.sweep import Case, Failure, Results

# glibc gives large blocks back to the system and pays for every page again; keeping them makes long prompts half as
# slow again. Other allocators ignore these.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

Watcher = Callable[[Case, dict[str, Any]], None]
"""Called with the case that runs and what it says: `what`, `done` and `total`, or `finished`, or `failed`, `reason`."""


def sweep(results: Results, texts: Path, *, watch: Watcher, retry_failed: bool = False) -> None:
    """Runs the cases that are neither done nor failed; `texts` is the folder that prompts' files are relative to.

    A case that raises, runs out of memory or is killed is recorded as failed, with its reason, and the rest goes on.
    Raises MisuseError where another sweep runs in the same folder, StabilityKitError where no case can be started.
    """
    with _alone(results.folder):
        _remove_torn(results.folder)
        if retry_failed:
            for case, _ in results.failed():
                results.forget_failure(case)
        worker: _Worker | None = None
        try:
            for case in results.missing():
                if worker is None:
                    worker = _Worker(results.folder, texts)
                failure = worker.run(case, watch)
                if failure is not None and failure.kind == "killed":
                    worker.end()
                    worker = None
                    _remove_torn(results.folder)
                if failure is None or results.is_done(case):  # it may be killed once its result is there
                    watch(case, {"finished": True})
                else:
                    results.write_failure(case, failure)
                    watch(case, {"failed": failure.kind, "reason": failure.reason})
        finally:
            if worker is not None:
                worker.end()


def _remove_torn(folder: Path) -> None:
    """Removes what is left of writes that were cut off."""
    for left_over in (folder / "records").glob(".*"):
        left_over.unlink()


class _Worker:
    def __init__(self, folder: Path, texts: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stabilitykit.sweeps.worker", str(folder), str(texts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            env=os.environ | _KEEP_MEMORY,
            text=True,
            encoding="utf-8",
        )
        if next(self._messages(), None) is None:
            raise StabilityKitError(f"The process that runs cases could not start: it {self._how_it_ended()}.")

    def run(self, case: Case, watch: Watcher) -> Failure | None:
        try:
            self._stdin.write(f"{case.id}\n")
            self._stdin.flush()
        except OSError:
            return Failure(kind="killed", reason=f"the process {self._how_it_ended()}")
        for message in self._messages():
            if "finished" in message:
                return None
            if "failed" in message:
                return Failure(kind=message["failed"], reason=message["reason"])
            watch(case, message)
        return Failure(kind="killed", reason=f"the process {self._how_it_ended()}")

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stdout.close()

    @property
    def _stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def _messages(self) -> Iterator[dict[str, Any]]:
        for line in self._stdout:
            message: dict[str, Any] = json.loads(line)
            yield message

    def _how_it_ended(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"ended with status {code}"
        name = signal.Signals(-code).name
        hint = ", which is how the system ends a process when memory runs out" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system lets go of however this process ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MisuseError(
                f"One sweep runs in a folder at a time, and another is at work in {folder}. Wait for it, or choose "
                "another folder with --out."
            ) from None
        yield
