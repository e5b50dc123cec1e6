"""Models as transformers builds them, from a folder on disk, with an adapter of peft's on top if one is given.

    subject = open_model("google/gemma-3-270m", dtype="float16")
    with record(subject.module) as recording:
        subject.module.generate(...)

Nothing is fetched: a name is looked for in the local Hugging Face cache. transformers and peft are imported when they
are first needed; they come with the extra `hf`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stabilitykit.checkpoints.cache import Progress, cache_folder
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import files_sha256, tensors_of, weight_files
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.devices import parse_device, parse_dtype
from stabilitykit.models.memory import must_stream
from stabilitykit.models.stream import STREAMED, StoredWeight
from stabilitykit.models.stream import stream as stream_weights
from stabilitykit.models.transformers.library import PREFIX, explained, imported, quiet
from stabilitykit.models.transformers.model import HuggingFaceModel
from stabilitykit.models.transformers.tokenizer import open_tokenizer

Attention = Literal["eager", "sdpa"]


def open_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    adapter: str | Path | None = None,
    stream: bool | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> HuggingFaceModel:
    """The model in the folder `name`, or of that name on the hub if it lies in the local cache, ready to run.

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
    if attention is not None and attention not in get_args(Attention):
        raise MisuseError(f"An attention is one of {', '.join(get_args(Attention))}; {attention!r} is none of them.")
    target, place = parse_dtype(dtype), parse_device(device)
    folder = local_folder(name)
    transformers = imported()
    with quiet(transformers), explained(name):
        trust = {"trust_remote_code": trust_remote_code}  # left out, transformers asks on the terminal
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
        _check_window(config.get_text_config(), name)
        how = {} if attention is None else {"attn_implementation": attention}
        quantised = getattr(config, "quantization_config", None)
        if stream is None and quantised is not None:
            stream = False
        stream = must_stream(stream, _elements(folder) * target.itemsize, place)
        if stream and quantised is not None:
            raise MisuseError(
                f"Weights that are streamed are cast as they are read; those of {name} are quantised, and are what its "
                "library makes of them while it loads. Leave --stream out."
            )
        if stream:
            model, loading = _streamed(transformers, folder, config, target, place, how, trust)
        else:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=target,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **how,
                **trust,
            )
    missing, unexpected = (sorted(map(str, loading.get(f"{kind}_keys", ()))) for kind in ("missing", "unexpected"))
    reshaped = [
        f"{tensor} is {list(stored)} and not {list(asked)}"
        for tensor, stored, asked in sorted(loading.get("mismatched_keys", ()))
    ]
    if missing or reshaped:
        lacking = missing or reshaped
        raise CheckpointError(
            f"{name}: the weights are those that the config asks for; {len(lacking)} of them "
            f"{'is' if len(lacking) == 1 else 'are'} {'missing' if missing else 'of another shape'} "
            f"({_first(lacking)}), and would be filled with random numbers. Another model's config, or an adapter's "
            "folder?"
        )
    notes = [f"run by transformers {version('transformers')}"]
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        notes.append("only the text part was run: what reads images or sound was not examined")
    if unexpected:
        have = "1 tensor in the folder has" if len(unexpected) == 1 else f"{len(unexpected)} tensors in the folder have"
        notes.append(f"{have} no place in the model ({_first(unexpected)})")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        notes.append(f"weights quantised by {getattr(method, 'value', method)}, computing in {str(target)[6:]}")
    if stream:
        notes.append(STREAMED)
    tokenizer = open_tokenizer(name, trust_remote_code=trust_remote_code)
    if str(config.model_type).startswith("gemma") and not tokenizer.begins:
        notes.append("the folder's tokenizer puts no <bos> before a text, where a released Gemma's does")
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
    transformers: Any,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    how: Mapping[str, str],
    trust: Mapping[str, bool],
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
    with torch.device("meta"):
        blank = transformers.AutoModelForCausalLM.from_config(config, **how, **trust)
    shapes = {tensor.shape for tensor in stored.values()}
    _refuse_made(folder, [name for name, one in blank.named_parameters() if one.ndim > 2 and one.shape not in shapes])
    model, loading = type(blank).from_pretrained(
        None,
        config=blank.config,
        state_dict=stored | placeholders,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused by name, as where nothing is streamed
        **how,
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)

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
            f"A weight that is streamed is one of the tensors in the folder's files; of {folder.name} {len(made)} are "
            f"made out of several while transformers loads them ({made[0]}, ...). Leave --stream out, where there is "
            "memory for all of them."
        )


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join([*names[:shown], *(["..."] if len(names) > shown else [])])


def _check_window(config: Any, name: str) -> None:
    """Of layers that slide; transformers checks the other sizes itself."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if slides and window is not None and window < 1:
        raise CheckpointError(
            f"{name}: a layer's window is of at least 1 token; the config's sliding_window is {window}."
        )


def _adapted(model: Any, adapter: str | Path) -> Any:
    try:
        with quiet(imported()):
            import peft
    except ImportError:
        raise MisuseError(
            'An adapter is read by peft, which is not installed here: pip install "stabilitykit[hf]".'
        ) from None
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise MisuseError(f"An adapter is a folder with an adapter_config.json; {adapter} has none.")
    with explained(str(adapter), "an adapter that peft can put on this model"), quiet(imported()):
        # peft only warns where an adapter's tensors have no place in the model
        warnings.filterwarnings("error", category=UserWarning)
        return peft.PeftModel.from_pretrained(model, str(adapter))
