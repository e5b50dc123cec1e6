"""What a folder says of its model before any weight is read: its config, its tokenizer, and where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabilitykit.checkpoints.cache import Progress, cache_folder
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import files_sha256, read_config, weight_files
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.models.transformers.load import run_by
from stabilitykit.models.transformers.tokenizer import HuggingFaceTokenizer, open_tokenizer

# What configs call the length of a text.
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceFolder:
    """A folder, or a name in the local cache, whose model transformers runs. `config` is what config.json holds."""

    name: str
    sha256: str
    config: Mapping[str, Any]
    tokenizer: HuggingFaceTokenizer
    notes: tuple[str, ...]

    @property
    def source(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def context(self) -> int:
        """Tokens; of a model without a limit a number beyond any text."""
        text = self.config["text_config"] if isinstance(self.config.get("text_config"), dict) else self.config
        return next((text[key] for key in _CONTEXTS if isinstance(text.get(key), int)), 1 << 62)


def open_folder(name: str, progress: Progress | None = None) -> HuggingFaceFolder:
    """`progress` is called with bytes while the digest of the weights is computed, the first time.

    Raises MisuseError for a name that is nowhere, CheckpointError for a folder without a config, weights or tokenizer.
    """
    folder = local_folder(name)
    return HuggingFaceFolder(
        name=name,
        sha256=files_sha256(weight_files(folder), cache_folder(), progress),
        config=read_config(folder),
        tokenizer=open_tokenizer(name),
        notes=run_by(),
    )
