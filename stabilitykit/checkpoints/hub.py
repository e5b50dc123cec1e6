"""Where a model of the Hugging Face Hub lies on this disk. Nothing is ever downloaded."""

from pathlib import Path

from stabilitykit.errors import MisuseError


def local_folder(name: str) -> Path:
    """The folder `name`, or that of the Hub's `OWNER/NAME` in the local Hugging Face cache.

    An existing folder takes precedence over a Hub name. Raises MisuseError for anything else, with the command that
    downloads it, and where `huggingface_hub`, which knows the cache and comes with the extra `hf`, is missing.
    """
    folder = Path(name)
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise MisuseError(
            f"hf: expects a folder or OWNER/NAME, and {name} is a file. Without hf: the kit's own model reads a "
            "Gemma's .gguf or .ckpt file."
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MisuseError(
            f"{name!r} is neither a folder nor a Hub name; pass a folder or OWNER/NAME, such as google/gemma-3-270m."
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise MisuseError(
            "The local Hugging Face cache is read by huggingface_hub, which is not installed: "
            'pip install "stabilitykit[hf]".'
        ) from None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise MisuseError(
            f"{name!r} is not a valid Hub name; expected OWNER/NAME, such as google/gemma-3-270m."
        ) from None
    except LocalEntryNotFoundError:
        raise MisuseError(
            f"{name} is not a folder here and not in the local Hugging Face cache, and nothing is downloaded "
            f"automatically. Download it with: hf download {name}"
        ) from None
