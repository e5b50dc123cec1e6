#!/usr/bin/env bash
# OpenVINO 2026.4.1, save_model with its defaults (compress_to_fp16=True).
#
# Guess: a constant that float16 cannot hold stays float32, or at least a warning is printed.
# Seen: a tensor stays float32 only where three quarters or more of its elements do not fit. Below that it is stored
# as float16, and each element past the maximum becomes 65,504, without a word on either stream.
#
#     share past the maximum   stored as   100,000 becomes
#     1/16                     float16     65,504
#     11/16                    float16     65,504
#     12/16                    float32     100,000
#
# Who meets it: a checkpoint with a few weights or tables (positions, masks, statistics) past 65,504.
# Way out: compress_to_fp16=False, or rescale first.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "numpy==2.4.6" "openvino==2026.4.1" 2>/dev/null
cat > "$folder/save.py" <<'PY'
import sys

import numpy as np
import openvino as ov
import openvino.opset13 as op

past, path = int(sys.argv[1]), sys.argv[2]
weights = np.ones(16, np.float32)
weights[:past] = 1e5
x = op.parameter([16], np.float32)
ov.save_model(ov.Model([op.add(x, op.constant(weights))], [x]), path)
PY
for case in "1 f16 65504" "11 f16 65504" "12 f32 100000"; do
    read -r past dtype value <<< "$case"
    said=$("$folder/venv/bin/python" "$folder/save.py" "$past" "$folder/$past.xml" 2>&1)
    [ -z "$said" ] || { echo "it says something now: $said"; exit 1; }
    "$folder/venv/bin/python" - "$folder/$past.xml" "$dtype" "$value" "$past" <<'PY'
import sys

import openvino as ov

path, dtype, value, past = sys.argv[1:]
(constant,) = (one for one in ov.Core().read_model(path).get_ops() if one.get_type_name() == "Constant")
found = constant.get_element_type().get_type_name(), float(constant.data.max())
print(f"{past}/16 past the maximum: stored as {found[0]}, 100,000 becomes {found[1]:,.0f}")
assert found == (dtype, float(value)), found
PY
done
