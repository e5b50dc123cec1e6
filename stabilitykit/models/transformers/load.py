"""Models as transformers builds them, from a folder on disk, with an adapter of peft's on top if one is given.

    subject = open_model("google/gemma-3-270m", dtype="float16")
    with record(subject.module) as recording:
        subject.module.generate(...)

Nothing is fetched: a name is looked for in the local Hugging Face cache. transformers and peft are imported when they
are first needed; they come with the extra `hf`.
"""

import logging
import re
import textwrap
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
from stabilitykit.models.gemma.load import parse_device, parse_dtype
from stabilitykit.models.memory import fits
from stabilitykit.models.stream import STREAMED, StoredWeight
from stabilitykit.models.stream import stream as stream_weights
from stabilitykit.records import printable

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

    def chat(
        self, text: str, *, system: str | None = None, bos: bool = True, special_tokens: bool = False
    ) -> list[int]:
        """One turn in the tokenizer's own chat template, up to where the answer begins; without `bos` less its first
        token, where that is `<bos>`. `special_tokens` reads control tokens in the text; else only the template's are.

        Raises MisuseError for a tokenizer without a template, for a template that refuses the turn, and for control
        tokens in the text where they cannot be told from the template's.
        """
        if not self.tokenizer.chat_template:
            raise MisuseError(
                f"A turn needs the tokenizer's chat template, and the one of {self.source} has none: leave --chat out."
            )
        said = [text] if system is None else [system, text]
        controls = self._controls()
        written = [] if special_tokens else [token for token in controls if any(token in part for part in said)]
        # what is written in the text stands behind a character of private use while the template is filled in
        unused = (mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if not any(mark in part for part in said))
        hidden = dict(zip(written, unused, strict=False))
        turns = [
            {"role": role, "content": _replaced(part, hidden)}
            for role, part in zip(("system", "user")[-len(said) :], said, strict=True)
        ]
        try:
            filled = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # jinja's, raised by the template itself
            raise MisuseError(f"The chat template of {self.source} refuses this turn: {error}.") from error
        ids = self.encode(filled, bos=False, special_tokens=True)
        if hidden:
            parts = re.split(f"({'|'.join(map(re.escape, controls))})", filled)
            if self._joined(parts, {}) != ids:
                raise MisuseError(
                    f"Around {written[0]} in the prompt, {self.source} cannot tell its template's tokens from text: "
                    "leave it out, or add --special-tokens if the token is meant."
                )
            ids = self._joined(parts, {mark: token for token, mark in hidden.items()})
        starts = not bos and ids[:1] == [self.tokenizer.bos_token_id]
        return ids[starts:]

    def _controls(self) -> list[str]:
        """The special tokens as they are written, the longer before what they begin with."""
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted((str(token.content) for token in added if token.special), key=len, reverse=True)

    def _joined(self, parts: Sequence[str], marks: Mapping[str, str]) -> list[int]:
        """The ids of text and control tokens by turns, with `marks` in the text replaced."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(part)))
            else:
                ids += self.encode(_replaced(part, marks), bos=False)
        return ids

    def piece(self, token: int) -> str:
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:
            return f"<row {token}>"
        if "\u2581" in text:  # SentencePiece's mark for a space
            text = text.replace("\u2581", " ")
        elif token not in self.tokenizer.all_special_ids:
            decoded = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if decoded and "\ufffd" not in decoded:  # else a part of a character, which its own name tells
                text = decoded
        return printable(str(text))

    @property
    def begins(self) -> bool:
        """Whether a text begins with `<bos>` unless that is left out."""
        return self.encode("a")[:1] == [self.tokenizer.bos_token_id]

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
    if len(loaded) <= len(loaded.all_special_ids):  # transformers makes up an empty one where there is no file
        raise CheckpointError(
            f"A model comes with its tokenizer, tokenizer.json or tokenizer.model; {folder} has none that holds "
            "tokens. Copy it there from where the weights came from."
        )
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

    def blank(self, dtype: torch.dtype) -> nn.Module | None:
        """None where something in the model is none of transformers' own: an adapter, quantised weights."""
        if self.causal is not self.module or getattr(self.causal.config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            model: nn.Module = type(self.causal)(self.causal.config)
        return model.to(dtype).eval()

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
        if temperature is not None and not (0 < top_p <= 1 and top_k >= 0):
            raise MisuseError(
                "transformers samples with a top_p above 0 and up to 1 and a top_k of at least 0, which keeps every "
                f"token; {top_p} and {top_k} were given."
            )
        rows = self.causal.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= rows:
            raise CheckpointError(
                f"{self.source}: a tokenizer's ids are rows of the embedding; it gave {int(ids.max()):,} and there are "
                f"{rows:,} rows. The tokenizer of another checkpoint?"
            )
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
    that needs it, as `stabilitykit.models.stream` does; None streams where the weights do not fit in the memory that is
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
        _check_window(config.get_text_config(), name)
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
                folder,
                dtype=target,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **how,
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
    tokenizer = open_tokenizer(name)
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


def _imported() -> Any:
    try:
        import transformers
    except ImportError:
        raise MisuseError(
            'hf: runs models as transformers builds them, and it is not installed here: pip install "stabilitykit[hf]".'
        ) from None
    return transformers


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join([*names[:shown], *(["..."] if len(names) > shown else [])])


def _replaced(text: str, by: Mapping[str, str]) -> str:
    for old, new in by.items():
        text = text.replace(old, new)
    return text


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
        with _quiet(_imported()):
            import peft
    except ImportError:
        raise MisuseError(
            'An adapter is read by peft, which is not installed here: pip install "stabilitykit[hf]".'
        ) from None
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise MisuseError(f"An adapter is a folder with an adapter_config.json; {adapter} has none.")
    with _explained(str(adapter), "an adapter that peft can put on this model"), _quiet(_imported()):
        # peft only warns where an adapter's tensors have no place in the model
        warnings.filterwarnings("error", category=UserWarning)
        return peft.PeftModel.from_pretrained(model, str(adapter))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the libraries' bars, remarks and warnings: what is wrong with a checkpoint is said by the kit."""
    told, bitsandbytes = transformers.utils.logging, logging.getLogger("bitsandbytes")
    verbosity, bars, level = told.get_verbosity(), told.is_progress_bar_enabled(), bitsandbytes.level
    told.set_verbosity_error()
    told.disable_progress_bar()
    bitsandbytes.setLevel(logging.ERROR)  # it regrets an absent kernel as soon as peft imports it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.set_verbosity(verbosity)
        bitsandbytes.setLevel(level)
        if bars:
            told.enable_progress_bar()


@contextmanager
def _explained(name: str, what: str = "a folder that transformers can load") -> Iterator[None]:
    """A library's refusal of a folder as the kit's own, with the reason it gave."""
    try:
        yield
    except MisuseError:
        raise
    except Exception as error:  # transformers, safetensors, peft and the hub's library each raise their own
        said = repr(error) if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = textwrap.shorten(said, 300, placeholder=" ...")
        raise CheckpointError(f"{name} is {what}; this one it cannot: {reason.removesuffix('.')}.") from error
