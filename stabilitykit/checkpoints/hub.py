"""Where a checkpoint of the hub lies on this disk. Nothing is ever fetched."""

from pathlib import Path

from stabilitykit.errors import MisuseError


def local_folder(name: str) -> Path:
    """The folder `name`, or that of the hub's `OWNER/NAME` in the local Hugging Face cache.

    A folder that exists is meant before a name. Raises MisuseError for what is neither, and says how to fetch it;
    also for a missing `huggingface_hub`, which knows the cache and comes with the extra `hf`.
    """
    folder = Path(name)
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise MisuseError(
            f"transformers' own code runs a folder, and {name} is a file: leave hf: out, and the kit's own model reads "
            "it if it is a Gemma's .gguf or .ckpt."
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MisuseError(
            f"A model is a folder, or a name on the hub such as google/gemma-3-270m; {name!r} is neither."
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise MisuseError(
            "The local Hugging Face cache is read by huggingface_hub, which is not installed here: "
            'pip install "stabilitykit[hf]".'
        ) from None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise MisuseError(
            f"A name on the hub is OWNER/NAME, such as google/gemma-3-270m; {name!r} cannot be one."
        ) from None
    except LocalEntryNotFoundError:
        raise MisuseError(
            f"{name} is no folder here and is not in the local Hugging Face cache, and nothing is fetched on its own: "
            f"hf download {name}"
        ) from None
