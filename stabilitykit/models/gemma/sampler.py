"""Temperature, top-p and top-k: from logits to the next token."""

import torch
from torch import Tensor, nn

from stabilitykit.errors import SamplingError


class Sampler(nn.Module):
    """Draws token ids with gemma_pytorch's semantics; it has no parameters and refuses no setting.

    A module so that its operators have a place: the logits' failures and the sampler's own look alike from
    outside. `top_k = 0` and `top_p < 0` leave no token, 0 / 0 follows; a temperature of 1e-4 takes float16
    logits to infinity. Both end in torch's "probability tensor contains either `inf`, `nan` or element < 0".
    """

    def forward(
        self,
        logits_BV: Tensor,
        *,
        temperature: float | None = 1.0,
        top_p: float = 0.95,
        top_k: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Token ids [B], int64; the logits are left as they are.

        With temperature None the largest logit wins, the first of equals, and nothing is refused: a row with NaN gives
        its first NaN, so that a row of NaN gives token 0, and so does one of -inf. Otherwise the logits are divided (in
        float32, rounded to their dtype), softmax is float32, tokens are kept while the probability before them is at
        most `top_p` and their rank is below `top_k`, and what is kept is renormalised. On a CPU, probabilities that are
        none raise torch's RuntimeError; elsewhere SamplingError, before the device asserts.
        """
        if temperature is None:
            return logits_BV.argmax(dim=-1)
        temperatures_B1 = torch.full((logits_BV.shape[0], 1), temperature, dtype=torch.float32, device=logits_BV.device)
        # In place on a copy: out of place the float32 divisor would make the quotient float32 and hide an overflow.
        scaled_BV = logits_BV.clone().div_(temperatures_B1)
        p_BV = torch.softmax(scaled_BV, dim=-1, dtype=torch.float32)
        sorted_BV, ids_BV = torch.sort(p_BV, dim=-1, descending=True)
        before_BV = torch.cumsum(sorted_BV, dim=-1) - sorted_BV
        rank_V = torch.arange(p_BV.shape[-1], device=p_BV.device)
        kept_BV = torch.where((before_BV > top_p) | (rank_V >= top_k), 0.0, sorted_BV)
        kept_BV = kept_BV / kept_BV.sum(dim=-1, keepdim=True)
        p_BV = torch.zeros_like(kept_BV).scatter(-1, ids_BV, kept_BV)
        if p_BV.device.type != "cpu":
            _refuse_non_probabilities(p_BV)
        return torch.multinomial(p_BV, num_samples=1, replacement=True, generator=generator).squeeze(-1)


def _refuse_non_probabilities(p_BV: Tensor) -> None:
    """Raise SamplingError where `torch.multinomial` would assert. Waits for the device."""
    bad_B = ~(torch.isfinite(p_BV) & (p_BV >= 0)).all(dim=-1)
    if bad_B.any():
        rows = bad_B.nonzero().flatten().tolist()
        raise SamplingError(
            "probability tensor contains either `inf`, `nan` or element < 0 "
            f"(in {len(rows)} of {len(p_BV)} sequences, the first is {rows[0]}). Either the logits were not finite, "
            "or temperature, top_p or top_k left no token. Found before torch.multinomial, which would have ended "
            f"every later use of {p_BV.device}."
        )
