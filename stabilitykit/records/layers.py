"""The layer that a module belongs to, by its path: the stack it stands in, and its number there."""

import re

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)(?=\.|$)")


def layer_of(module: str) -> tuple[str, int] | None:
    """`("encoder.block", 1)` of `encoder.block.1.layer.0.SelfAttention`; None for a module outside the layers."""
    found = _LAYER.search(module)
    return None if found is None else (module[: found.start(1) - 1], int(found[1]))


def is_layer(site: str) -> bool:
    """Whether a site is what a whole layer returns: `layers.7`, `encoder.block.1`."""
    found = layer_of(site)
    return found is not None and site == f"{found[0]}.{found[1]}"
