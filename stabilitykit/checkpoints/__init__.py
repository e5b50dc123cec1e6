"""A checkpoint on disk -> config, tensors, vocabulary; one file per format."""

from stabilitykit.checkpoints.cache import cache_folder
from stabilitykit.checkpoints.checkpoint import Checkpoint, Vocabulary
from stabilitykit.checkpoints.config import RELEASED, GemmaConfig, released
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.checkpoints.sources import open_checkpoint

__all__ = [
    "RELEASED",
    "Checkpoint",
    "GemmaConfig",
    "Vocabulary",
    "cache_folder",
    "open_checkpoint",
    "parameter_shapes",
    "random_checkpoint",
    "released",
]
