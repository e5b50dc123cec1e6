#!/usr/bin/env bash
# onnxconverter-common 1.16.0 (with onnx 1.19.1), convert_float_to_float16 with its defaults.
#
# Guess: converting a float32 weight to float16 is a rounding; only what float16 cannot hold is changed.
# Seen: every magnitude above 10,000 becomes 10,000, 12,000 and 60,000 too, which float16 holds exactly; every
# non-zero magnitude below 1e-7 becomes 1.19e-7 (2 × 2^-24), so 1e-8 grows twelvefold where rounding would give 0, and
# 2^-24 (5.96e-8), which float16 holds exactly, doubles. The warning names only the largest and the smallest number.
#
#     12000.0 -> 10000.0   60000.0 -> 10000.0   70000.0 -> 10000.0
#     1e-08 -> 1.19e-07   5.96e-08 -> 1.19e-07
#
# Who meets it: an eps of a rescaled norm (1e-6 · γ² is 1.6e-8 at γ = 1/8), a mask of -60,000, subnormal weights.
# Way out: min_positive_val=2**-24 (or 0) and max_finite_val=65504.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "numpy==2.4.6" "onnx==1.19.1" "onnxconverter-common==1.16.0" 2>/dev/null
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common.float16 import convert_float_to_float16

weights = np.array([12000, 60000, 70000, -60000, 1e-8, 2.0**-24, -1e-8, 0, 1.5], np.float32)


def converted(**options):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [9])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return numpy_helper.to_array(convert_float_to_float16(model, **options).graph.initializer[0])


kept = converted()
for before, after in zip(weights, kept):
    print(f"{before:>10.4g} -> {float(after):.3g}")
small = np.float16(2.0**-23)  # the nearest number to 1e-7
expected = np.array([10000, 10000, 10000, -10000, small, small, -small, 0, 1.5], np.float16)
assert kept.dtype == np.float16 and np.array_equal(kept, expected), kept
other = converted(min_positive_val=2.0**-24, max_finite_val=65504.0)
assert np.array_equal(other[:4], np.array([12000, 60000, 65504, -60000], np.float16)), other
assert other[5] == np.float16(2.0**-24), other
PY
