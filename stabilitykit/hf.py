"""Models as transformers builds them, from a folder on disk, with an adapter of peft's on top if one is given.

    subject = open_model("google/gemma-3-270m", dtype="float16")
    with record(subject.module) as recording:
        subject.module.generate(...)

Nothing is fetched: a name is looked for in the local Hugging Face cache. transformers and peft are imported when they
are first needed; they come with the extra `hf`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stabilitykit.checkpoints.cache import Progress, cache_folder
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import files_sha256, tensors_of, weight_files
from stabilitykit.errors import CheckpointError, MisuseError, SamplingError
from stabilitykit.gemma.load import parse_device, parse_dtype
from stabilitykit.gemma.room import fits
from stabilitykit.gemma.stream import STREAMED, StoredWeight
from stabilitykit.gemma.stream import stream as stream_weights

PREFIX = "hf:"

Attention = Literal["eager", "sdpa"]


@dataclass(frozen=True, slots=True)
class HuggingFaceTokenizer:
    """A checkpoint's own tokenizer, with the three things that a prompt needs."""

    tokenizer: Any
    source: str

    def encode(self, text: str, *, bos: bool = True, special_tokens: bool = False) -> list[int]:
        """The tokenizer's ids; `bos` adds what the tokenizer puts around a text, `special_tokens` reads them in it."""
        ids = self.tokenizer(text, add_special_tokens=bos, split_special_tokens=not special_tokens)["input_ids"]
        return [int(token) for token in ids]

    def chat(self, text: str, *, system: str | None = None) -> list[int]:
        """One turn in the tokenizer's own chat template, up to where the answer begins.

        Raises MisuseError for a tokenizer without a template and for a template that refuses the turn.
        """
        if not self.tokenizer.chat_template:
            raise MisuseError(
                f"A turn needs the tokenizer's chat template, and the one of {self.source} has none: leave --chat out."
            )
        turns = [{"role": "system", "content": system}] if system is not None else []
        try:
            ids = self.tokenizer.apply_chat_template(
                [*turns, {"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # jinja's, raised by the template itself
            raise MisuseError(f"The chat template of {self.source} refuses this turn: {error}.") from error
        return [int(token) for token in ids]

    def piece(self, token: int) -> str:
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:
            return str(token)
        if "\u2581" in text:  # SentencePiece's mark for a space
            text = text.replace("\u2581", " ")
        elif token not in self.tokenizer.all_special_ids:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False) or text
        return str(text).replace("\n", "\\n").replace("\t", "\\t")

    @property
    def pad(self) -> int:
        """The id that stands for padding, `<eos>` where there is none of its own, as is transformers' habit."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in known if token is not None), 0)


def open_tokenizer(name: str) -> HuggingFaceTokenizer:
    """The tokenizer in the folder `name`, or of that name in the local cache; raises as `open_model` does."""
    folder = local_folder(name)
    transformers = _imported()
    with _quiet(transformers), _explained(name):
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return HuggingFaceTokenizer(loaded, f"{PREFIX}{name}")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """A causal language model of transformers' with its tokenizer: what `stabilitykit profile hf:FOLDER` runs.

    `module` is the PreTrainedModel, or the PeftModel around it where there is an adapter.
    """

    module: Any
    tokenizer: HuggingFaceTokenizer
    source: str
    sha256: str
    notes: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def causal(self) -> Any:
        """The model that makes the logits, without what an adapter wraps around it."""
        return self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    @property
    def config(self) -> Any:
        return self.causal.config.get_text_config()

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers: the longest list of modules there is."""
        lists = [m for m in self.causal.modules() if isinstance(m, nn.ModuleList)]
        return list(max(lists, key=len, default=()))

    @property
    def device(self) -> torch.device:
        return torch.device(self.causal.device)

    @property
    def context(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", 1 << 62))

    @property
    def pad(self) -> int:
        return self.tokenizer.pad

    def piece(self, token: int) -> str:
        return self.tokenizer.piece(token)

    def decode(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        temperature: float | None,
        top_p: float,
        top_k: int,
        seed: int,
        padding: Tensor | None,
        mask: Tensor | None,
        every_logit: bool,
        saw: Callable[[Tensor], bool],
    ) -> list[list[int]]:
        """transformers' own `generate`, with `saw` looking at each step's logits; torch's generators stay as they were.

        Logits are those of the last position. Where they are not finite, sampling raises torch's RuntimeError on a CPU
        and SamplingError elsewhere, before the device asserts; greedy decoding ends after that token. Raises
        MisuseError for a mask of one's own and for `every_logit`, which `generate` has no place for.
        """
        if mask is not None or every_logit:
            raise MisuseError("transformers' generate makes its own masks and the last logits alone; ask for neither.")
        from transformers import GenerationConfig, StoppingCriteriaList

        told = self.causal.generation_config
        how: dict[str, Any] = {"do_sample": False}
        if temperature is not None:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens, pad_token_id=self.pad, eos_token_id=told.eos_token_id, **how
        )
        ended = False

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal ended
            ended = saw(output.logits)
            if ended and temperature is not None and output.logits.device.type != "cpu":
                raise SamplingError("probability tensor contains either `inf`, `nan` or element < 0")

        def stop(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(so_far),), ended, device=so_far.device)

        attention = torch.ones_like(ids) if padding is None else padding.long()
        handle = self.causal.register_forward_hook(look, with_kwargs=True)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                made = self.module.generate(
                    input_ids=ids,
                    attention_mask=attention,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        finally:
            handle.remove()
        new: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return new


def open_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    adapter: str | Path | None = None,
    stream: bool | None = None,
    progress: Progress | None = None,
) -> HuggingFaceModel:
    """The model in the folder `name`, or of that name on the hub if it lies in the local cache, ready to run.

    `attention` is transformers' choice unless given. `adapter` is the folder of a LoRA or another adapter that peft
    reads. Weights that are quantised stay so and compute in `dtype`. With `stream` each matrix is read by every call
    that needs it, as `stabilitykit.gemma.stream` does; None streams where the weights do not fit in the memory that is
    free. An adapter's own weights stay. `progress` is called with bytes while the files' digest is computed, the first
    time they are opened.

    Raises MisuseError for a missing extra, a name that is nowhere, an unknown attention or dtype, and for quantised
    weights that are to be streamed; CheckpointError, with the library's reason, for a folder that cannot be loaded, and
    for weights that do not fit the model.
    """
    if attention is not None and attention not in get_args(Attention):
        raise MisuseError(f"An attention is one of {', '.join(get_args(Attention))}; {attention!r} is none of them.")
    target, place = parse_dtype(dtype), parse_device(device)
    folder = local_folder(name)
    transformers = _imported()
    with _quiet(transformers), _explained(name):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        how = {} if attention is None else {"attn_implementation": attention}
        quantised = getattr(config, "quantization_config", None)
        if stream is None:
            stream = quantised is None and not fits(_elements(folder) * target.itemsize, place)
        if stream and quantised is not None:
            raise MisuseError(
                f"Weights that are streamed are cast as they are read; those of {name} are quantised, and are what its "
                "library makes of them while it loads. Leave --stream out."
            )
        if stream:
            model, loading = _streamed(transformers, folder, config, target, place, how)
        else:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=target, local_files_only=True, output_loading_info=True, **how
            )
    wrong = {
        kind: sorted(map(str, loading.get(f"{kind}_keys", ()))) for kind in ("missing", "unexpected", "mismatched")
    }
    if wrong["missing"] or wrong["mismatched"]:
        lacking = wrong["missing"] or wrong["mismatched"]
        raise CheckpointError(
            f"{name}: the weights are those that the config asks for; {len(lacking)} of them are "
            f"{'missing' if wrong['missing'] else 'of another shape'} ({', '.join(lacking[:3])}, ...), and would be "
            "filled with random numbers. Another model's config, or an adapter's folder?"
        )
    notes = [f"run by transformers {version('transformers')}"]
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        notes.append("only the text part was run: what reads images or sound was not examined")
    if wrong["unexpected"]:
        some = ", ".join(wrong["unexpected"][:3])
        notes.append(f"{len(wrong['unexpected'])} tensors in the folder have no place in the model ({some}, ...)")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        notes.append(f"weights quantised by {getattr(method, 'value', method)}, computing in {str(target)[6:]}")
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
        tokenizer=open_tokenizer(name),
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
    transformers: Any, folder: Path, config: Any, dtype: torch.dtype, device: torch.device, how: Mapping[str, str]
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
        blank = transformers.AutoModelForCausalLM.from_config(config, **how)
    shapes = {tensor.shape for tensor in stored.values()}
    _refuse_made(folder, [name for name, one in blank.named_parameters() if one.ndim > 2 and one.shape not in shapes])
    model, loading = type(blank).from_pretrained(
        None, config=blank.config, state_dict=stored | placeholders, dtype=dtype, output_loading_info=True, **how
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


def _imported() -> Any:
    try:
        import transformers
    except ImportError:
        raise MisuseError(
            'hf: runs models as transformers builds them, and it is not installed here: pip install "stabilitykit[hf]".'
        ) from None
    return transformers


def _adapted(model: Any, adapter: str | Path) -> Any:
    try:
        import peft
    except ImportError:
        raise MisuseError(
            'An adapter is read by peft, which is not installed here: pip install "stabilitykit[hf]".'
        ) from None
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise MisuseError(f"An adapter is a folder with an adapter_config.json; {adapter} has none.")
    with _explained(str(adapter)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # peft only warns where an adapter's tensors have no place in the model
        warnings.filterwarnings("error", category=UserWarning)
        return peft.PeftModel.from_pretrained(model, str(adapter))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars and remarks: what is wrong with a checkpoint is said by the kit."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """A library's refusal of a folder as the kit's own, with the reason it gave."""
    try:
        yield
    except MisuseError:
        raise
    except Exception as error:  # transformers, safetensors, peft and the hub's library each raise their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{name} is a folder that transformers can load; this one it cannot: {reason.rstrip('.')}."
        ) from error
