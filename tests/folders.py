"""Models of transformers' as folders on disk, with a tokenizer of single characters for those that read text."""

from pathlib import Path
from typing import Any

import transformers
from scaled.runs import VOCABULARY
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def save(model: Any, folder: Path, *, tokenizer: bool = True) -> Path:
    """`model` in `folder`; its tokenizer has a token for each of the first printable characters."""
    model.save_pretrained(folder)
    if tokenizer:
        characters = [chr(code) for code in (10, *range(32, 127))][: VOCABULARY - len(_SPECIAL)]
        ids = {piece: index for index, piece in enumerate((*_SPECIAL, *characters))}
        made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        made.decoder = decoders.Fuse()
        kind: Any = transformers.PreTrainedTokenizerFast
        kind(
            tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
        ).save_pretrained(folder)
    return folder
