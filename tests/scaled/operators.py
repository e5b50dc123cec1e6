"""One operator at a time between parameters that may be scaled: what its rule says is tried alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaled.runs import dtype_of, noise

Function = Callable[..., Any]


class Between(nn.Module):
    """made · f(given · x, ...), with a number `given` for each operand and a number `made` for each result.

    `inner` are modules that f uses. What f returns is a tensor, or several.
    """

    def __init__(self, function: Function, *shapes: tuple[int, ...], results: int = 1, inner: nn.Module | None = None):
        super().__init__()
        self.function = function
        self.shapes = shapes
        self.inner = inner
        self.given = nn.ParameterList([nn.Parameter(torch.tensor(1.25)) for _ in shapes])
        self.made = nn.ParameterList([nn.Parameter(torch.tensor(0.75)) for _ in range(results)])

    def forward(self) -> tuple[Tensor, ...]:
        operands = [
            scale * noise(*shape, seed=place).to(scale.dtype)
            for place, (scale, shape) in enumerate(zip(self.given, self.shapes, strict=True))
        ]
        made = self.function(*operands) if self.inner is None else self.function(self.inner, *operands)
        several = made if isinstance(made, tuple | list) else (made,)
        return tuple(scale * one for scale, one in zip(self.made, several, strict=True))


class Cut(nn.Module):
    """The rows of a projection are used by halves, which may have scales of their own, and f is given all of them.

    f gets a tensor of shape (2, 3, 8), of which the last dimension was made by the rows.
    """

    def __init__(self, function: Function, results: int = 1):
        super().__init__()
        self.function = function
        self.fused = nn.Parameter(noise(8, 4, seed=7))
        self.made = nn.ParameterList([nn.Parameter(torch.tensor(0.75)) for _ in range(results + 2)])

    def forward(self) -> tuple[Tensor, ...]:
        whole = F.linear(noise(2, 3, 4, seed=8).to(dtype_of(self)), self.fused)
        first, second = whole.chunk(2, dim=-1)
        made = self.function(whole)
        several = made if isinstance(made, tuple | list) else (made,)
        return tuple(scale * one for scale, one in zip(self.made, (first, second, *several), strict=True))


def alone(function: Function, *shapes: tuple[int, ...], **how: Any) -> Callable[[], nn.Module]:
    return lambda: Between(function, *shapes or ((2, 3, 8),), **how)


def cut(function: Function, **how: Any) -> Callable[[], nn.Module]:
    return lambda: Cut(function, **how)


def _into(function: Function) -> Function:
    """`function` writes into what it is given."""

    def written(x: Tensor, *others: Tensor) -> Tensor:
        x = x.clone()
        function(x, *others)
        return x

    return written


def _read_by_another(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    flat = x.view(6, 8)
    flat[1:3].mul_(y.view(6, 8)[1:3])
    return x.transpose(0, 1)[0] + x[1, 0]


def _at(x: Tensor) -> Tensor:
    return torch.tensor([2, 0], device=x.device)


def _chosen(order: Function) -> Function:
    """What an order or a condition of x chooses from numbers that have no scale."""
    return lambda x: order(x).to(x.dtype)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.float().unflatten(2, (4, 2)))


ATEN = torch.ops.aten
SHAPE = (2, 3, 8)
IMAGE = (2, 4, 6, 6)
LINE = (2, 4, 6)
VOLUME = (1, 2, 4, 4, 4)
VECTOR = (8,)
MATRIX = (4, 4)

# What f(2^e x) = 2^(k e) f(x) holds for, or what needs several operands of one scale: the scales can be moved.
FREE: dict[str, Callable[[], nn.Module]] = {
    # views and moves
    "reshaped": alone(lambda x: x.reshape(6, 8).t().reshape(2, 24).view(4, 12).unsqueeze(0).squeeze(0)),
    "turned": alone(lambda x: x.permute(2, 0, 1).transpose(0, 1).movedim(0, 2).flip(0).roll(1, 0)),
    "taken": alone(lambda x: (x[:, 1], x[..., 2:5], x.diagonal(0, 1, 2), x.unfold(2, 4, 2)), results=4),
    "split": alone(lambda x: (*x.split(1, 1), *x.unbind(0), *x.split([3, 5], 2)), results=7),
    "cut without a check": alone(
        lambda x: (*torch.unsafe_split(x, 4, 2), *torch.ops.aten.unsafe_split_with_sizes(x, [3, 5], 2)), results=4
    ),
    "cut, turned": cut(lambda x: x.transpose(1, 2)[:, :4].transpose(1, 2).repeat(1, 2, 1).flip(1)),
    "cut, gathered": cut(lambda x: x[..., [0, 3, 1]].flip(-1).unsqueeze(1).expand(2, 2, 3, 3)),
    "strided": cut(lambda x: x.as_strided((3, 4), (4, 1), 2)),
    "picked by a mask": cut(lambda x: x[(noise(2, 3, 8) > 0)]),
    "selected by a mask": cut(lambda x: torch.masked_select(x, noise(2, 3, 8) > 0)),
    "taken at": cut(lambda x: torch.take(x, torch.tensor([1, 5, 30]))),
    "complex": alone(lambda x: torch.view_as_real(_complex(x))),
    "complex of halves": cut(lambda x: torch.view_as_real(_complex(x).conj().resolve_conj())),
    "real and imaginary": alone(
        lambda x: (_complex(x).real, _complex(x).imag), results=2
    ),
    "looked up": alone(
        lambda x: (x.index_select(2, _at(x)), x.gather(2, torch.zeros(2, 3, 1, dtype=torch.long)),
                   x[0][_at(x)], F.embedding(_at(x), x[0]), x.repeat_interleave(2, 1)), results=5
    ),
    "moved by name": alone(
        lambda x: (ATEN.alias(x), ATEN._reshape_alias(x, [6, 8], [8, 1]), ATEN.lift_fresh_copy(x), ATEN.lift_fresh(x)),
        results=4,
    ),
    "triangles": alone(lambda x: (x.tril(), x.triu()), results=2),
    "copied": alone(lambda x: (x.clone().contiguous(), x.detach(), x.float().to(x.dtype), +x), results=4),
    # chosen by size
    "largest": alone(lambda x: (x.max(), x.max(-1).values, x.amax(1), x.topk(2).values, x.sort(-1).values), results=5),
    "smallest": alone(lambda x: (x.min(), x.min(-1).values, x.amin(1), *x.aminmax(dim=1)), results=5),
    "in the middle": alone(
        lambda x: (x.median(-1).values, x.kthvalue(2).values, x.mode(-1).values, x.nanmedian(), x.msort()), results=5
    ),
    "so far": alone(lambda x: (x.cummax(1).values, x.cummin(1).values, x.cumsum(1)), results=3),
    "largest of both halves": cut(lambda x: x.amax(-1)),
    "pooled by size": alone(
        lambda x: (F.max_pool2d(x, 2), F.adaptive_max_pool2d(x, 3), F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2),
                   F.channel_shuffle(x, 2)), IMAGE, results=5
    ),
    "pooled by size, along a line": alone(lambda x: (F.max_pool1d(x, 2), F.adaptive_max_pool1d(x, 3)), LINE, results=2),
    "pooled by size, in a volume": alone(lambda x: F.max_pool3d(x, 2), VOLUME),
    "columns": alone(lambda x: F.fold(F.unfold(x, 2), (6, 6), 2), IMAGE),
    # padded and written
    "padded": alone(lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, 2), value=float("-inf")).amax(-1)), results=2),
    "padded halves": cut(lambda x: F.pad(x, (1, 2))),
    "padded by itself": alone(
        lambda x: (F.pad(x, (1, 2), mode="reflect"), F.pad(x, (1, 2), mode="replicate"),
                   F.pad(x.unsqueeze(1), (1, 1, 1, 1), mode="reflect"),
                   F.pad(x.unsqueeze(1), (1, 1, 1, 1), mode="replicate")), results=4
    ),
    "written": alone(
        lambda x, y: (x.index_put((_at(x),), y), x.index_copy(0, _at(x) // 2, y), x.index_add(0, _at(x) // 2, y),
                      x.index_put((_at(x) // 2,), y, accumulate=True)),
        (3, 8), (2, 8), results=4,
    ),
    "scattered": alone(
        lambda x, y: (x.scatter(0, torch.zeros(2, 8, dtype=torch.long), y[:1].expand(2, 8)),
                      x.scatter_add(0, torch.zeros(2, 8, dtype=torch.long), y),
                      x.scatter_reduce(0, torch.zeros(2, 8, dtype=torch.long), y, "amax"),
                      x.slice_scatter(y, 0, 0, 2), x.select_scatter(y[0], 0, 1),
                      x.masked_scatter(x > 0, y.repeat(3, 1)), x.put(torch.tensor([1, 9]), y[0, :2]),
                      x[:, :3].diagonal_scatter(y[0, :3].repeat(1), 0)),
        (3, 8), (2, 8), results=8,
    ),
    "written in place": alone(_into(lambda x, y: x[:2].copy_(y)), (3, 8), (2, 8)),
    "multiplied in place": alone(_into(lambda x, y: x.mul_(y)), SHAPE, SHAPE),
    "multiplied through a view": alone(_into(lambda x, y: x[0].mul_(y[0])), SHAPE, SHAPE),
    "scaled through a view, read by another": alone(_read_by_another, SHAPE, SHAPE),
    "written into zeros": alone(lambda x: torch.zeros(4, 3, 8, dtype=x.dtype).index_copy_(0, _at(x), x)),
    "written into nothing": alone(
        lambda x: (torch.empty_like(x).copy_(x), x.new_empty(2, 3, 8).copy_(x), torch.empty(2, 3, 8).copy_(x),
                   torch.empty_strided((2, 3, 8), (24, 8, 1)).copy_(x),
                   x.new_empty_strided((2, 3, 8), (24, 8, 1)).copy_(x),
                   ATEN.empty_permuted([2, 3, 8], [0, 1, 2]).copy_(x),
                   torch.zeros_like(x).index_add(0, _at(x) // 2, x)), results=7,
    ),
    "added into new zeros": alone(lambda x: x.new_zeros(4, 3, 8).index_add_(0, _at(x), x)),
    "filled with zeros": alone(_into(lambda x: (x[0].zero_(), x[1].fill_(0.0), x.index_fill_(1, _at(x), 0.0)))),
    "zeros of a size": alone(
        lambda x: (torch.full((2, 3, 8), 0.0, dtype=x.dtype) + x, torch.full_like(x, 0.0) + x,
                   x.new_full((2, 3, 8), float("-inf")).maximum(x),
                   torch.full((4, 3, 8), 0.0, dtype=x.dtype).index_copy(0, _at(x), x)), results=4
    ),
    "halves written": cut(lambda x: torch.zeros(4, 3, 8, dtype=x.dtype).index_copy(0, _at(x), x)),
    "one behind the other": alone(
        lambda x, y: (torch.cat([x, y], 1), torch.stack([x, y]), torch.cat([x[:, :0], y], 1)), SHAPE, SHAPE, results=3
    ),
    "halves one behind the other": cut(lambda x: torch.cat([x[..., 2:6], x], -1)),
    # linear, together
    "itself": alone(
        lambda x: (-x, x.abs(), F.relu(x), F.leaky_relu(x, 0.1), F.prelu(x, torch.tensor([0.25], dtype=x.dtype))),
        results=5,
    ),
    "dropped": alone(lambda x: (torch.native_dropout(x, 0.5, False)[0], F.rrelu(x, training=False)), results=2),
    "summed": alone(
        lambda x: (x.sum(), x.sum(-1), x.mean(1), x.std(-1), x.std(), x.nansum(-1), x.norm(dim=-1),
                   x[0].float().trace(), x.norm()), results=9
    ),
    "summed halves": cut(lambda x: x.sum(-1)),
    "length of halves": cut(lambda x: x.norm(dim=-1)),
    "bags of halves": cut(lambda x: F.embedding_bag(_at(x)[None], x[0].float(), mode="sum").sum(-1)),
    "distances between halves": cut(lambda x: torch.cdist(x.float(), x.float(), p=1.0)),
    "averaged": alone(
        lambda x: (F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 3), F.adaptive_avg_pool2d(x, 1),
                   F.interpolate(x, scale_factor=2), F.interpolate(x, scale_factor=2, mode="nearest-exact"),
                   F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(x, scale_factor=2, mode="bicubic"),
                   F.interpolate(x.float(), size=(4, 4), mode="bilinear", antialias=True),
                   F.interpolate(x.float(), size=(4, 4), mode="bicubic", antialias=True)), IMAGE, results=9
    ),
    "averaged along a line": alone(
        lambda x: (F.avg_pool1d(x, 2), F.adaptive_avg_pool1d(x, 3), F.interpolate(x, scale_factor=2),
                   F.interpolate(x, scale_factor=2, mode="nearest-exact"),
                   F.interpolate(x, scale_factor=2, mode="linear")), LINE, results=5
    ),
    "averaged in a volume": alone(
        lambda x: (F.avg_pool3d(x.float(), 2), F.adaptive_avg_pool3d(x.float(), 3), F.interpolate(x, scale_factor=2),
                   F.interpolate(x, scale_factor=2, mode="trilinear")), VOLUME, results=4
    ),
    "transformed": alone(
        lambda x: (torch.fft.rfft(x.float()).abs(), torch.fft.irfft(torch.fft.rfft(x.float())),
                   torch.fft.fft(torch.fft.fft(x.float())).abs()), (2, 3, 8), results=3
    ),
    "bags by name": alone(
        lambda x: ATEN._embedding_bag(x.float(), _at(x), torch.tensor([0]), False, 0, False, None)[0], (3, 8)
    ),
    "distances": alone(lambda x, y: torch.cdist(x.float(), y.float(), p=1.0), SHAPE, SHAPE),
    "counts": alone(lambda x: (x.norm(0), torch.cdist(x.float(), x.float(), p=0.0)), results=2),
    "bags": alone(lambda x: F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), x[0].float(), mode="mean")),
    "weighted bags": alone(
        lambda x, w: F.embedding_bag(_at(x)[None], x.float(), mode="sum", per_sample_weights=w.float()), (3, 8), (1, 2)
    ),
    "added": alone(lambda x, y: (x + y, x - y, torch.rsub(x, y), x + 2 * y, x + 0.0), SHAPE, SHAPE, results=5),
    "masked, added": alone(lambda x: (x + torch.zeros(8, dtype=x.dtype).index_fill(0, _at(x), -1e38)).amax(-1)),
    "chosen": alone(
        lambda x, y: (torch.where(x > 0, x, y), torch.maximum(x, y), torch.minimum(x, y), x.fmax(y), x.fmin(y),
                      x.masked_fill(y > 0, 0.0), torch.where(x > 0, x, 0.0)), SHAPE, SHAPE, results=7
    ),
    "bounded": alone(
        lambda x, y: (x.clamp(min=0), x.clamp(max=1e38), x.clamp_min(y), x.clamp_max(y), F.hardtanh(x, 0.0, 1e5),
                      x.nan_to_num(0.0, 1e38, -1e38)), SHAPE, SHAPE, results=6
    ),
    "compared": alone(
        lambda x, y: ((x < y).to(x.dtype), (x > y).to(x.dtype), (x <= y).to(x.dtype), (x >= y).to(x.dtype),
                      (x == y).to(x.dtype), (x != y).to(x.dtype), (x > 0).to(x.dtype)), SHAPE, SHAPE, results=7
    ),
    "between two": alone(lambda x, y: torch.lerp(x, y, 0.25), SHAPE, SHAPE),
    # products
    "times": alone(lambda x, y: (x * y, x / y, 3 * x, x / 3, 3 / y), SHAPE, SHAPE, results=5),
    "a rounded quotient": alone(lambda x, y: torch.div(x, y, rounding_mode="trunc"), SHAPE, SHAPE),
    "times, added": alone(lambda x, y, z: x.addcmul(y, z, value=0.5), SHAPE, SHAPE, SHAPE),
    "over, added": alone(lambda x, y, z: x.addcdiv(y, z, value=0.5), SHAPE, SHAPE, SHAPE),
    "to a power": alone(
        lambda x: (x.square(), x.abs().sqrt(), x.abs().rsqrt(), x.reciprocal(), x.pow(3), x.abs().pow(0.5)), results=6
    ),
    "variance": alone(lambda x: (x.var(-1), *torch.var_mean(x, -1)), results=3),
    "variance of halves": cut(lambda x: x.var(-1)),
    "variance and mean of halves": cut(lambda x: torch.var_mean(x, -1), results=2),
    "matrices": alone(
        lambda x, y, z: (x @ y, torch.addmm(z, x, y), torch.bmm(x[None], y[None]), x @ y[0], torch.dot(x[0], y[1]),
                         torch.baddbmm(z[None], x[None], y[None]), torch.addmv(z[0], x, y[0]),
                         torch.addbmm(z, x[None], y[None]), torch.vdot(x[0], y[0])),
        MATRIX, MATRIX, MATRIX, results=9,
    ),
    "halves times a matrix": cut(lambda x: x @ noise(8, 5).to(x.dtype)),
    "halves times halves": cut(lambda x: x[0] @ x[1].mT),
    "groups of matrices": alone(
        lambda x, y: F.grouped_mm(x.bfloat16(), y.bfloat16(), offs=torch.tensor([3, 8], dtype=torch.int32)),
        (8, 16), (2, 16, 8),
    ),
    "convolved": alone(
        lambda x, w, b: F.conv2d(x, w, b, padding=1), IMAGE, (3, 4, 3, 3), (3,)
    ),
    "convolved by name": alone(
        lambda x, w: ATEN._convolution(x, w, None, [1], [0], [1], False, [0], 1, False, False, False, False),
        LINE, (3, 4, 2),
    ),
    "convolved along a line": alone(lambda x, w: F.conv1d(x, w, groups=2), LINE, (4, 2, 3)),
    "convolved back": alone(lambda x, w: F.conv_transpose2d(x, w, stride=2), IMAGE, (4, 3, 2, 2)),
    "halves convolved": cut(lambda x: F.conv1d(x.transpose(1, 2), noise(3, 8, 2).to(x.dtype))),
    # norms without an eps, which no setting could follow
    "normed by the batch": alone(
        lambda x, m, v, w, b: F.batch_norm(x, m[0, :, 0], v[0, :, 0].abs(), w[0, :, 0], b[0, :, 0], eps=0.0),
        LINE, LINE, LINE, LINE, LINE,
    ),
    "normed": alone(
        lambda x, w, b: (F.layer_norm(x, (8,), w, b, 0.0), torch.native_layer_norm(x, (8,), None, None, 0.0)[1],
                         torch.native_layer_norm(x, (8,), None, None, 0.0)[2], F.group_norm(x, 3, w[:3], b[:3], 0.0)),
        SHAPE, VECTOR, VECTOR, results=4,
    ),
    "normed by roots": alone(
        lambda x, w: torch.ops.aten._fused_rms_norm(x.float(), [8], w.float(), 0.0), SHAPE, VECTOR, results=2
    ),
    "halves normed": cut(lambda x: F.layer_norm(x, (8,), eps=0.0)),
    "attention": alone(
        lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]), SHAPE, SHAPE, SHAPE
    ),
    "signs": alone(lambda x: (x.sign(), x.sgn()), results=2),
    "an angle": alone(lambda x, y: torch.atan2(x, y), SHAPE, SHAPE),
    "orders": alone(
        lambda x: [one.to(x.dtype) for one in (
            x.argmax(-1), x.argmin(-1), x.argsort(-1), x.isnan(), x.isinf(), x.isfinite(), x.isposinf(), x.isneginf(),
            x.any(-1), x.all(-1), x.signbit(), x.logical_not(), x.nonzero(), x.count_nonzero(), x.logical_and(x),
            x.logical_or(x), x.logical_xor(x))], results=17
    ),
    "order of halves": cut(_chosen(lambda x: x.argmax(-1) + x.argmin(-1))),
    "a gate": cut(lambda x: x[..., :4] * torch.sigmoid(x[..., 4:])),
    "a gate in one": cut(lambda x: F.glu(x, -1)),
}  # fmt: skip


def _each(*functions: Function) -> Function:
    return lambda x: tuple(f(x) for f in functions)


# What no power of two but 1 leaves as it is: the scales of the operands stay.
HELD: dict[str, Callable[[], nn.Module]] = {
    "softmax": alone(_each(lambda x: x.softmax(-1), lambda x: x.log_softmax(-1)), results=2),
    "activations": alone(
        _each(F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus, F.elu, F.celu, F.selu, F.mish, F.hardswish,
              F.hardsigmoid, F.logsigmoid, F.softshrink, F.hardshrink), results=14
    ),
    "exponentials": alone(_each(torch.exp, torch.exp2, torch.expm1, torch.sinh, torch.cosh), results=5),
    "logarithms": alone(
        lambda x: [f(x.abs() + x.abs()) for f in (torch.log, torch.log2, torch.log10, torch.log1p)], results=4
    ),
    "waves": alone(_each(torch.sin, torch.cos, torch.tan, torch.sinc, torch.atan, torch.erf, torch.erfc), results=7),
    "within 1": alone(lambda x: [f(0.1 * x) for f in (torch.asin, torch.acos, torch.erfinv)], results=3),
    "special functions": alone(
        _each(lambda x: x.abs().lgamma(), lambda x: x.abs().digamma(), torch.i0, lambda x: (0.1 * x.abs()).logit()),
        results=4,
    ),
    "sums of exponentials": alone(_each(lambda x: x.logsumexp(-1), lambda x: x.logcumsumexp(-1)), results=2),
    "rounded": alone(_each(torch.round, torch.floor, torch.ceil, torch.trunc, torch.frac), results=5),
    "remainders": alone(
        lambda x, y: (x.fmod(y), x.remainder(y), x // y, torch.div(x, y, rounding_mode="trunc")), SHAPE, SHAPE,
        results=4,
    ),
    "products of elements": alone(_each(lambda x: x.prod(-1), lambda x: x.cumprod(-1)), results=2),
    "a slope": alone(lambda x: F.prelu(noise(2, 8).to(x.dtype), x), (1,)),
    "rooted through a view": alone(_into(lambda x: x.abs_().view(6, 8)[:2].sqrt_())),
    "a threshold": alone(lambda x: F.threshold(x, 0.1, 0.0)),
    "a constant added": alone(_each(lambda x: x + 1.5, lambda x: 1.5 - x, lambda x: x - 1.5), results=3),
    "integers added": alone(lambda x: x + torch.arange(8)),
    "a constant chosen": alone(
        _each(lambda x: torch.where(x > 0, x, 1.5), lambda x: x.masked_fill(x > 0, 1.5)), results=2
    ),
    "a constant bound": alone(
        _each(lambda x: x.clamp(-0.5, 0.5), lambda x: x.clamp_max(0.5), lambda x: x.clamp_min(1e-5), F.hardtanh),
        results=4,
    ),
    "compared with a constant": alone(lambda x: (x > 0.5).to(x.dtype)),
    "padded with a constant": alone(lambda x: F.pad(x, (1, 1), value=1.5)),
    "a constant written": alone(_into(lambda x: x[0].fill_(1.5))),
    "a constant instead": alone(_into(lambda x: x.fill_(1.5))),
    "ones of a size": alone(lambda x: torch.full_like(x, 1.5) + x),
    "a power that is a tensor": alone(lambda x: x.abs() ** torch.tensor([0.5] * 8, dtype=x.dtype)),
    "a number to a power": alone(lambda x: 2.0**x),
    "an integer of it": alone(lambda x: (4 * x).long().to(x.dtype)),
    "its value": alone(lambda x: torch.full((3,), x[0, 0, 0].item(), dtype=x.dtype)),
    "a weight between": alone(lambda x: torch.lerp(torch.zeros(8, dtype=x.dtype), torch.ones(8, dtype=x.dtype), x)),
    "buckets": alone(
        lambda x: (torch.bucketize(x.float(), torch.tensor([-0.5, 0.0, 0.5])).to(x.dtype),
                   torch.histc(x.float(), 4, -2.0, 2.0)), results=2
    ),
    "sampled": alone(
        lambda x: F.grid_sample(
            noise(1, 2, 4, 4), x.float().unflatten(2, (4, 2)).flatten(0, 1)[None], align_corners=False
        )
    ),
    "distances by name": alone(lambda x, y: ATEN._euclidean_dist(x.float(), y.float()), SHAPE, SHAPE),
    "softmax by name": alone(lambda x: ATEN._safe_softmax(x, -1)),
    "an eps of its own": alone(
        lambda x: (F.layer_norm(x, (8,), eps=1e-5), F.group_norm(x, 3, eps=1e-5), F.rms_norm(x, (8,), eps=1e-5)),
        results=3,
    ),
    "a batch's eps": alone(lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), eps=1e-5), LINE),
    "looked for": alone(lambda x: torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5]), x.float()).to(x.dtype)),
    "drawn": alone(lambda x: F.one_hot(torch.multinomial(x[0].abs(), 8), 8).sum(1).to(x.dtype)),
}  # fmt: skip

OPERATORS = FREE | HELD

# Of those that are free, operands that stay.
STILL = {
    "multiplied through a view": {"given.1"},
    "scaled through a view, read by another": {"given.1"},
}
