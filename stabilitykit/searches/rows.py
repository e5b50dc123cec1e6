"""Many tokens after the same context on any model of transformers': each a row of its own, recorded.

Slower than `scan`, which computes a context once; but it asks nothing of a model except that it reads rows of tokens.
"""

from collections.abc import Sequence

from stabilitykit.searches.confirm import PromptRecorder
from stabilitykit.searches.scan import Count, Peak

_TOKENS = 2048  # in a batch


class RowScanner:
    """Peaks as `recorder` finds them, logits included."""

    dtype = "float32"

    def __init__(self, recorder: PromptRecorder) -> None:
        self._recorder = recorder

    def scan(self, candidates: Sequence[int], context: Sequence[int] = (), progress: Count | None = None) -> list[Peak]:
        """The peak of each of `candidates` when it follows `context`, in their order."""
        size = max(1, _TOKENS // (len(context) + 1))
        found: list[Peak] = []
        for start in range(0, len(candidates), size):
            found += self._recorder.after(candidates[start : start + size], context)
            if progress is not None:
                progress(len(found), len(candidates))
        return found
