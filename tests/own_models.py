"""The models of somebody's first hour, as folders: a Llama and a Gemma that float32 runs and float16 does not.

Their weights are drawn, and all that the embedding writes is multiplied by a power of two, which changes no logit in
float32 and brings the residual stream to the end of float16's range. The Gemma leaves it for any text, the Llama where
there is a "w".
"""

from pathlib import Path

from folders import save
from scaled.runs import ids
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from truth.models import decoder, under_stress

GAMMA = 2.0**14


def own_llama(folder: Path) -> Path:
    model = decoder("llama")
    save(model, folder)
    model.model.embed_tokens.weight[AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("w")] *= 13
    return save(under_stress(model, GAMMA, ids(12)), folder)


def own_gemma(folder: Path) -> Path:
    """With a tokenizer that puts <bos> before a text, as a released one does."""
    save(under_stress(decoder("gemma3"), GAMMA, ids(12)), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder
