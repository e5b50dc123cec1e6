"""Models as transformers builds them, from a folder on disk, with an adapter of peft's on top if one is given.

    subject = open_model("google/gemma-3-270m", dtype="float16")
    with record(subject.module) as recording:
        subject.module.generate(...)

Nothing is fetched: a name is looked for in the local Hugging Face cache. transformers and peft are imported when they
are first needed; they come with the extra `hf`.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from stabilitykit.checkpoints.cache import Progress, cache_folder
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import CONFIG, files_sha256, tensors_of, weight_files
from stabilitykit.choices import Attention, check_choice
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.devices import parse_device, parse_dtype
from stabilitykit.models.memory import must_stream
from stabilitykit.models.stream import STREAMED, StoredWeight
from stabilitykit.models.stream import stream as stream_weights
from stabilitykit.models.transformers.backend import PREFIX, explained, imported, quiet
from stabilitykit.models.transformers.model import HuggingFaceModel
from stabilitykit.models.transformers.tokenizer import TOKENIZER_FILES, HuggingFaceTokenizer, open_tokenizer
from stabilitykit.words import counted, listed

# Which of transformers' doors is tried where a config does not name its class.
_DOORS = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMaskedLM", "AutoModel",
)  # fmt: skip


def open_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    adapter: str | Path | None = None,
    stream: bool | None = None,
    trust_remote_code: bool = False,
    whole: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> HuggingFaceModel:
    """The model in the folder `name`, or of that name on the hub if it lies in the local cache, ready to run.

    It is the causal language model, or with `whole` the class that config.json names, whatever it reads and returns,
    with the folder's tokenizer if there is one. `settings` replace what config.json says: the nested dictionary that a
    config's `to_dict` makes.

    `attention` is transformers' choice unless given. `adapter` is the folder of a LoRA or another adapter that peft
    reads. Weights that are quantised stay so and compute in `dtype`. With `stream` each matrix is read by every call
    that needs it, as `stabilitykit.models.stream` does; None streams where the weights do not fit in the memory that is
    free. An adapter's own weights stay. Python code that the folder brings runs only with `trust_remote_code`; without
    it nothing is asked, and a folder that needs its code is refused. `progress` is called with bytes while the files'
    digest is computed, the first time they are opened.

    Raises MisuseError for a missing extra, a name that is nowhere, a folder that needs its own code, an unknown
    attention or dtype, and for quantised weights that are to be streamed; CheckpointError, with the library's reason,
    for a folder that cannot be loaded, and for weights that do not fit the model.
    """
    if attention is not None:
        check_choice("attention", attention, get_args(Attention))
    target, place = parse_dtype(dtype), parse_device(device)
    folder = _folder(name)
    transformers = imported()
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code}  # left out, transformers asks on the terminal
    with quiet(transformers), explained(name):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **how)
        config = config if settings is None else type(config).from_dict(copy.deepcopy(dict(settings)))
        _check_window(config.get_text_config(), name)
        how |= {} if attention is None else {"attn_implementation": attention}
        quantised = getattr(config, "quantization_config", None)
        if stream is None and quantised is not None:
            stream = False
        stream = must_stream(stream, _elements(folder) * target.itemsize, place)
        if stream and quantised is not None:
            raise MisuseError(
                f"Streamed weights are cast as they are read, but those of {name} are quantised, and become what they "
                "are while the library loads them. Leave out --stream."
            )
        kind = named_class(transformers, config, trust_remote_code) if whole else transformers.AutoModelForCausalLM
        if stream:
            model, loading = _streamed(kind, folder, config, target, place, how)
        else:
            model, loading = kind.from_pretrained(
                folder,
                config=config,
                dtype=target,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused by name
                **how,
            )
    check_loading(name, loading)
    tokenizer = _tokenizer(folder, name, trust_remote_code, whole)
    notes = _notes(config, tokenizer, loading, target, whole)
    if stream:
        notes.append(STREAMED)
    facts = {"implementation": "transformers", "attention": model.config._attn_implementation}
    if adapter is not None:
        model = _adapted(model, adapter)
        notes.append("with an adapter of peft's")
        facts["adapter"] = Path(adapter).name
    if quantised is None:
        model = model.to(place)
    return HuggingFaceModel(
        module=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        source=f"{PREFIX}{name}",
        sha256=files_sha256(weight_files(folder), cache_folder(), progress),
        notes=tuple(notes),
        facts=facts,
    )


def _folder(name: str) -> Path:
    folder = local_folder(name)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{name} has no {CONFIG}, so it is no model's folder: save_pretrained writes one.")
    return folder


def named_class(transformers: Any, config: Any, trust_remote_code: bool) -> Any:
    """The class that a config names, whatever it reads and returns, or that transformers has for its type.

    Raises CheckpointError where there is none.
    """
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    found = getattr(transformers, named, None) if named else None
    if found is not None:
        return found
    for door in _DOORS:
        try:
            with torch.device("meta"):
                return type(getattr(transformers, door).from_config(config, trust_remote_code=trust_remote_code))
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise
    raise CheckpointError(f"transformers has no model for a config of the type {config.model_type!r}.")


def continues_text(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether the class that config.json names is a decoder that writes on: neither has an encoder beside it, as T5,
    nor looks ahead or comes without a head, as BERT and models that embed.

    Raises as `open_model` does.
    """
    folder = _folder(name)
    transformers = imported()
    with quiet(transformers), explained(name):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        found = named_class(transformers, config, trust_remote_code)
    return bool(found.can_generate()) and not getattr(config, "is_encoder_decoder", False)


def _tokenizer(folder: Path, name: str, trust_remote_code: bool, whole: bool) -> HuggingFaceTokenizer | None:
    """The folder's tokenizer; None where a `whole` model comes without its files, as those that read no text do."""
    if whole and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    return open_tokenizer(name, trust_remote_code=trust_remote_code)


def check_loading(name: str, loading: Mapping[str, Any]) -> None:
    """Raises CheckpointError, by name, for weights that transformers would fill with random numbers."""
    missing = sorted(map(str, loading.get("missing_keys", ())))
    reshaped = [
        f"{tensor} is {list(stored)} and not {list(asked)}"
        for tensor, stored, asked in sorted(loading.get("mismatched_keys", ()))
    ]
    lacking = missing or reshaped
    if lacking:
        raise CheckpointError(
            f"{name}: {counted(len(lacking), 'tensor')} that the config asks for "
            f"{'is' if len(lacking) == 1 else 'are'} {'missing' if missing else 'of another shape'} "
            f"({listed(lacking, 3)}), and would be filled with random numbers. Is the config another model's, or the "
            "folder an adapter's?"
        )


def _notes(
    config: Any, tokenizer: HuggingFaceTokenizer | None, loading: Mapping[str, Any], dtype: torch.dtype, whole: bool
) -> list[str]:
    """What a reader has to know about the model, and could not guess."""
    notes = [f"run by transformers {version('transformers')}"]
    if whole:
        pass
    elif getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        notes.append("only the text part was run: what reads images or sound was not examined")
    unexpected = sorted(map(str, loading.get("unexpected_keys", ())))
    if unexpected:
        have = "1 tensor in the folder has" if len(unexpected) == 1 else f"{len(unexpected)} tensors in the folder have"
        notes.append(f"{have} no place in the model ({listed(unexpected, 3)})")
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        notes.append(f"weights quantised by {getattr(method, 'value', method)}, computing in {str(dtype)[6:]}")
    if str(config.model_type).startswith("gemma") and tokenizer is not None and not tokenizer.begins:
        notes.append("the folder's tokenizer puts no <bos> before a text, where a released Gemma's does")
    return notes


def stored_tensors(name: str) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor in the folder's files of weights, memory-mapped."""
    for path in weight_files(local_folder(name)):
        yield from tensors_of(path).items()


def stored_bytes(name: str) -> int:
    """The size of those files."""
    return sum(path.stat().st_size for path in weight_files(local_folder(name)))


def _elements(folder: Path) -> int:
    return sum(tensor.numel() for path in weight_files(folder) for tensor in tensors_of(path).values())


def _streamed(
    kind: Any,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    how: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The model, its matrices read from the folder's files as it runs, and what transformers says of its loading.

    transformers is given placeholders, and renames and ties them as it would the weights. Each has a storage of its
    own, by which a parameter tells what tensor in the files it stands for. Raises MisuseError for weights that
    transformers makes out of several tensors while it loads.
    """
    stored = {name: tensor for path in weight_files(folder) for name, tensor in tensors_of(path).items()}
    weights = {
        name: StoredWeight(read=partial(stored.__getitem__, name), dtype=dtype, device=device)
        for name, tensor in stored.items()
        if tensor.ndim > 1 and tensor.is_floating_point()
    }
    placeholders = {name: torch.full((), torch.nan, dtype=dtype).expand(stored[name].shape) for name in weights}
    known = {key: value for key, value in how.items() if key != "trust_remote_code"}  # where the class is known
    with torch.device("meta"):
        blank = kind.from_config(config, **how) if hasattr(kind, "from_config") else kind._from_config(config, **known)
    shapes = {tensor.shape for tensor in stored.values()}
    _refuse_made(folder, [name for name, one in blank.named_parameters() if one.ndim > 2 and one.shape not in shapes])
    model, loading = type(blank).from_pretrained(
        None,
        config=blank.config,
        state_dict=stored | placeholders,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused by name, as where nothing is streamed
        **known,
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = imported().GenerationConfig.from_pretrained(folder)

    names = {tensor.untyped_storage()._cdata: name for name, tensor in placeholders.items()}
    found = {name: names.get(one.untyped_storage()._cdata) for name, one in model.named_parameters()}
    if not (loading["missing_keys"] or loading["mismatched_keys"]):
        _refuse_made(folder, [name for name, one in model.named_parameters() if one.ndim > 1 and found[name] is None])
    for module, leaf, buffer in [(m, leaf, b) for m in model.modules() for leaf, b in m.named_buffers(recurse=False)]:
        name = names.get(buffer.untyped_storage()._cdata)
        if name is not None:
            setattr(module, leaf, weights[name].whole())
    stream_weights(model, {name: weights[one] for name, one in found.items() if one is not None})
    return model, loading


def _refuse_made(folder: Path, made: Sequence[str]) -> None:
    if made:
        raise MisuseError(
            f"Only tensors in the folder's files can be streamed, and transformers makes {len(made)} weights of "
            f"{folder.name} out of several while it loads them ({made[0]}, ...). Leave out --stream; they have to "
            "fit in memory."
        )


def _check_window(config: Any, name: str) -> None:
    """Of layers that slide; transformers checks the other sizes itself."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if slides and window is not None and window < 1:
        raise CheckpointError(f"{name}: sliding_window in the config must be at least 1 token, got {window}.")


def _adapted(model: Any, adapter: str | Path) -> Any:
    try:
        with quiet(imported()):
            import peft
    except ImportError:
        raise MisuseError('Adapters need peft, which is not installed: pip install "stabilitykit[hf]".') from None
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise MisuseError(f"{adapter} has no adapter_config.json, so it is no adapter's folder.")
    with explained(str(adapter), "an adapter that peft can put on this model"), quiet(imported()):
        # peft only warns where an adapter's tensors have no place in the model
        warnings.filterwarnings("error", category=UserWarning)
        return peft.PeftModel.from_pretrained(model, str(adapter))
