#!/usr/bin/env bash
# MLX 0.32.4 on an x86-64 CPU, mlx.core.softmax of 16-bit logits.
#
# Guess: whatever is added inside, probabilities of a row come to one within what the format can hold; a library made for
# 16-bit models adds them in float32, or loses the last digits at worst.
# Seen: the total is kept in the inputs' own format, where it stops growing once a term is half a step: in bfloat16 rows
# of equal logits come to 1 up to 256 of them, to 8 at 2,048 and to 64 at 16,384; in float16 to 1 up to 2,048 and to 8
# at 16,384. Of bfloat16 logits drawn from N(0, 0.5²) 4,096 come to 4.65.
# Every probability is finite and in [0, 1]. With precise=True, which is not the default, and inside
# fast.scaled_dot_product_attention, all come to one.
#
# Who meets it: attention written out with softmax over a long context, routers, samplers over a vocabulary: no error,
# no NaN, and values several times too large.
# Way out: softmax(..., precise=True), or a cast to float32 before it.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" "numpy==2.4.6" 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import sys

import mlx.core as mx
import numpy as np


def total(logits, **how):
    return float(np.array(mx.softmax(logits, **how).astype(mx.float32)).astype(np.float64).sum())


expected = {
    (mx.bfloat16, 256): 1.0, (mx.bfloat16, 2048): 8.0, (mx.bfloat16, 16384): 64.0,
    (mx.float16, 2048): 1.0, (mx.float16, 16384): 8.0,
}
same = True
for (dtype, count), wanted in expected.items():
    flat = mx.zeros((count,), dtype=dtype)
    plain, precise = total(flat), total(flat, precise=True)
    same &= plain == wanted and abs(precise - 1) < 1e-2
    print(f"{count:6d} equal logits in {dtype}: {plain:g}; precise {precise:.4f}")

drawn = mx.array(np.random.RandomState(0).randn(4096) * 0.5).astype(mx.bfloat16)
print(f"  4096 drawn logits in bfloat16: {total(drawn):.2f}; precise {total(drawn, precise=True):.4f}")
same &= 4 < total(drawn) < 5 and abs(total(drawn, precise=True) - 1) < 1e-2

query, keys, ones = (mx.full((1, 1, count, 64), value, dtype=mx.bfloat16) for count, value in ((1, 0), (4096, 0), (4096, 1)))
attended = float(mx.fast.scaled_dot_product_attention(query, keys, ones, scale=1.0)[0, 0, 0, 0])
print(f"  attention over 4096 values of 1 in bfloat16: {attended:g}")
same &= attended == 1
sys.exit(0 if same else 1)
PY
