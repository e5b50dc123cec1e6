"""The text decoder of Gemma 1, 2 and 3, its tokenizer and its sampler."""

from stabilitykit.models.gemma.generate import generate
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.load import build, load
from stabilitykit.models.gemma.model import ROUNDINGS, Gemma, RMSNorm
from stabilitykit.models.gemma.sampler import Sampler

__all__ = ["ROUNDINGS", "Gemma", "KVCache", "RMSNorm", "Sampler", "build", "generate", "load"]
