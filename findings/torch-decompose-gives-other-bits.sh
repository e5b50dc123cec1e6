#!/usr/bin/env bash
# torch 2.13.0 on a CPU, OpOverload.decompose, as a dispatch mode uses it to see the parts of composite operators.
#
# Guess: taking a composite operator apart is what torch does itself, so the parts compute the same bits.
# Seen: where torch registers a decomposition in Python, decompose() prefers it over the C++ kernel that torch runs.
# Bilinear and bicubic resizing then give other bits, and nothing says so.
#
#     upsample_bilinear2d.vec  bits equal: False; through the C++ kernel: True
#     upsample_bicubic2d.vec  bits equal: False; through the C++ kernel: True
#
# Who meets it: a profiler, a quantiser or a recorder that is a TorchDispatchMode changes what it looks at, under
# inference_mode, where composites reach a mode whole.
# Way out: call the CompositeImplicitAutograd kernel instead of decompose().
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import torch

torch.manual_seed(0)
x = torch.randn(1, 3, 8, 8)
key = torch._C.DispatchKey.CompositeImplicitAutograd
with torch.inference_mode():
    for name in ("upsample_bilinear2d", "upsample_bicubic2d"):
        operator = getattr(torch.ops.aten, name).vec
        arguments = (x, [13, 13], False, None)
        plain = operator(*arguments)
        apart, kernel = operator.decompose(*arguments), operator._op_dk(key, *arguments)
        print(f"{name}.vec  bits equal: {torch.equal(plain, apart)}; through the C++ kernel: {torch.equal(plain, kernel)}")
        assert not torch.equal(plain, apart)
        assert torch.equal(plain, kernel)
PY
