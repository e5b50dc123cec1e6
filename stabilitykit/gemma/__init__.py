"""The text decoder of Gemma 1, 2 and 3, its tokenizer and its sampler."""

from stabilitykit.gemma.generate import generate
from stabilitykit.gemma.kv_cache import KVCache
from stabilitykit.gemma.load import build, load
from stabilitykit.gemma.model import ROUNDINGS, Gemma, RMSNorm
from stabilitykit.gemma.sampler import Sampler
from stabilitykit.gemma.stress import apply_stress

__all__ = ["ROUNDINGS", "Gemma", "KVCache", "RMSNorm", "Sampler", "apply_stress", "build", "generate", "load"]
