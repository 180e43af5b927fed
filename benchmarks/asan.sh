#!/bin/sh
# The kernel tests under AddressSanitizer (g++): benchmarks/asan.sh [more arguments for pytest]
# Every read and write of the kernels is checked against the tensors and the scratch memory that they were given.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
objects=${TMPDIR:-/tmp}/hymba-asan
mkdir -p "$objects"
library=$("$python" hymba/csrc/build.py --output "$objects/libhymba.so" --objects "$objects" \
    --flags "-O1 -g -fno-omit-frame-pointer -fsanitize=address")
# Python itself is not instrumented: the runtime comes first by preloading, and leaks of the interpreter are not ours
HYMBA_LIBRARY=$library \
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
    "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py tests/test_native_decode.py tests/test_quant.py -k "native or quant" "$@"
