"""Positions, tokens and rows: which axis is which, in a few lines of code, and where it cannot be known."""

from typing import Any

import torch
from torch import Tensor, nn

from truth.plain import broke, lines, rows
from truth.row import Expected, Planted

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LOST = 11  # the token whose embedding breaks: row 1, position 2
SIZE = 4


def table(module: nn.Module | None = None) -> Any:
    """An embedding of small numbers, but for one token's first channel, and what comes after it."""

    def modules() -> dict[str, nn.Module]:
        embedding = nn.Embedding(64, SIZE)
        embedding.weight.data.uniform_(-1, 1)
        embedding.weight.data[LOST] = 0
        embedding.weight.data[LOST, 0] = 300.0
        return {"embed": embedding} | ({} if module is None else {"part": module})

    return modules


def token(site: str, operator: str, **rest: Any) -> Expected:
    """Row 1, position 2: the one token that breaks."""
    return broke(
        site, operator, "overflow",
        **{"row": 1, "rows": (1,), "position": 2, "positions": (2,), "token": LOST, "value": 90000.0,
           "never": ("starts with", "token 0", "<bos>")} | rest,
    )  # fmt: skip


def unknown(site: str, operator: str, **rest: Any) -> Expected:
    """Nothing can be said of positions, so nothing may be."""
    return broke(
        site,
        operator,
        "overflow",
        **{"value": 90000.0, "never": (r"at (token|frame|patch|position) \d", "starts with")} | rest,
    )


def square(m: Any, ids: Tensor) -> Tensor:
    x = m.embed(ids)
    return x * x - 1


def flat(m: Any, ids: Tensor) -> Tensor:
    """Rows and positions joined, as experts take them."""
    x = m.embed(ids).flatten(0, 1)
    return (x * x - 1).unflatten(0, ids.shape)


def length_first(m: Any, ids: Tensor) -> Tensor:
    x = m.embed(ids).transpose(0, 1).contiguous()
    return (x * x - 1).transpose(0, 1)


def channels_first(m: Any, ids: Tensor) -> Tensor:
    x = m.embed(ids).mT.contiguous()
    return (x * x - 1).mT


def heads(m: Any, ids: Tensor) -> Tensor:
    x = m.embed(ids).unflatten(-1, (2, 2)).transpose(1, 2)
    return (x * x - 1).transpose(1, 2).flatten(-2)


def summed(m: Any, ids: Tensor) -> Tensor:
    """[B, L]: no channels are left."""
    x = m.embed(ids)
    return (x * 300).sum(-1) - 1


def sorted_rows(m: Any, ids: Tensor) -> Tensor:
    """Rows in another order, as tokens sorted by expert are."""
    x = m.embed(ids).flatten(0, 1)
    order = torch.arange(len(x) - 1, -1, -1)
    return (x[order] * x[order] - 1)[order]


def pooled(m: Any, ids: Tensor) -> Tensor:
    """The mean over positions belongs to none of them."""
    x = m.embed(ids).sum(1)
    return x * x.abs().amax(-1, keepdim=True) - 1


def last_two(m: Any, ids: Tensor) -> Tensor:
    x = m.embed(ids)[:, 2:]
    return x * x - 1


def shifted(m: Any, ids: Tensor) -> Tensor:
    """A token is put before the others, so positions are one more."""
    x = m.embed(ids)
    x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    return x * x - 1


def loop(m: Any, ids: Tensor) -> Tensor:
    """One position after the other, as a recurrence takes them."""
    x = m.embed(ids)
    return torch.stack([x[:, t] * x[:, t] - 1 for t in range(x.shape[1])], 1)


def from_mask(m: Any, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
    return inputs_embeds * inputs_embeds * attention_mask[..., None]


def of_time(m: Any, latents: Tensor, timestep: Tensor) -> Tensor:
    """Time steps are numbers, and no tokens."""
    return latents * latents * (1 + 0 * timestep[:, None, None, None])


def two_orders(m: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    x = m.embed(input_ids)
    return x * x + position_ids[..., None]


def run_twice(m: Any) -> Tensor:
    m(IDS[:, :2])
    return m(IDS[:, 2:])


def crossed(m: Any, x: Tensor) -> Tensor:
    """Whatever one position has, all get: no prompt is safe that only begins in the same way."""
    return x + x.amax(1, keepdim=True) * 300 - 1


def mixed(m: Any, ids: Tensor) -> Tensor:
    return crossed(m, m.embed(ids))


def placed(code: Any, expected: Expected, **how: Any) -> Planted:
    return lines(code, IDS, modules=table(), expected=expected, wide=True, **how)


def padded() -> Planted:
    """Left padding: the padding's own embedding breaks, in the row that has it."""
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])

    def modules() -> dict[str, nn.Module]:
        part = table()()
        part["embed"].weight.data[0, 1] = 300.0
        return part

    return lines(
        square, ids, modules=modules, wide=True,
        expected=broke("/mul.0", "mul", "overflow", row=0, rows=(0,), position=0, positions=(0, 1), token=0,
                       value=90000.0, never=("starts with",)),
    )  # fmt: skip


def vectors() -> Tensor:
    x = torch.ones(1, 4, SIZE, dtype=torch.float64)
    x[0, 2, 1] = 300.0
    return x


def image(place: tuple[int, ...]) -> Tensor:
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    x[place] = 300.0
    return x


def two_steps() -> Planted:
    """Without a cache the second call begins anew."""
    planted = lines(
        square, IDS, modules=table(), expected=token("/mul.0", "mul", step=1, position=0, positions=(0,), never=())
    )
    return Planted(model=planted.model, run=run_twice, expected=planted.expected)


def cropped() -> Planted:
    """The second call puts other tokens where those of the first were, as speculative decoding does."""

    def run(m: Any) -> Tensor:
        m(torch.tensor([[5, 6, 7, 8, 9]]))
        return m(torch.tensor([[5, 6, LOST, 8]]))

    planted = lines(square, IDS, modules=table(), expected=None)
    return Planted(model=planted.model, run=run, expected=token("/mul.0", "mul", row=0, rows=(0,), step=1))


ROWS = rows(
    6,
    ("a token in a batch", lambda: placed(square, token("/mul.0", "mul"))),
    ("rows and positions joined", lambda: placed(flat, token("/mul.0", "mul"))),
    ("length first", lambda: placed(length_first, token("/mul.0", "mul"))),
    ("channels before positions", lambda: placed(channels_first, token("/mul.0", "mul", channel=0))),
    ("heads", lambda: placed(heads, token("/mul.0", "mul"))),
    ("no channels left", lambda: placed(summed, token("/mul.0", "mul", value=90000.0, channel=None))),
    ("rows in another order", lambda: placed(
        sorted_rows, token("/mul.0", "mul", unsure=("row", "rows", "position", "positions", "token")))),
    ("pooled over positions", lambda: placed(pooled, unknown("/mul.0", "mul", row=1).but(value=None))),
    ("the last positions alone", lambda: placed(last_two, token("/mul.0", "mul"))),
    ("a token put before the others", lambda: placed(
        shifted, broke("/mul.0", "mul", "overflow", row=1, value=90000.0, never=("token 2 '", "id 12")))),
    ("one position after the other", lambda: placed(loop,
        token("/mul.*", "mul", unsure=("position", "positions", "token")))),
    ("two calls", two_steps),
    ("other tokens in the same place", cropped),
    ("padding", padded),
    ("a mask of ones is no tokens", lambda: lines(
        from_mask, named={"inputs_embeds": vectors(), "attention_mask": torch.ones(1, 4).long()}, wide=True,
        expected=broke("/mul.0", "mul", "overflow", value=90000.0, position=2,
            never=(r"id 1\b", "starts with", "<bos>")))),
    ("time steps are no tokens", lambda: lines(
        of_time, image((1, 2, 3, 1)), torch.tensor([981, 981]), wide=True,
        expected=broke("/mul.0", "mul", "overflow", value=90000.0, never=("981", "starts with", r"at token \d")))),
    ("positions beside tokens", lambda: lines(
        two_orders, named={"input_ids": IDS, "position_ids": torch.arange(4).repeat(2, 1)}, modules=table(), wide=True,
        expected=token("/mul.0", "mul"))),
    ("what every position has of one", lambda: lines(
        mixed, torch.tensor([[5, 6, LOST]]), modules=table(), wide=True,
        expected=broke("/mul.0", "mul", "overflow", value=90000.0, never=("starts with", "depends only")))),
)  # fmt: skip
