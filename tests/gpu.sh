#!/usr/bin/env bash
# What there is to learn on a GPU, in one go: are the kernels right, do they stay inside their memory, how fast are they,
# what does calibration cost. From the root of the repository: bash tests/gpu.sh FOLDER, which gets the answers.
set -euo pipefail
out=${1:?usage: bash tests/gpu.sh FOLDER}
mkdir -p "$out"
if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,driver_version --format=csv > "$out/card.csv"; fi

python3 -m pytest -q tests/test_multiply.py tests/test_cuda.py tests/test_flexbcq.py 2>&1 | tee "$out/tests.txt"

# one shape each that only the readable kernel takes, and that both take; under these tools a kernel is 100 times slower
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python3 -m pytest -q tests/test_multiply.py \
            -k "(cuda or fast or readable) and (33-576-3-64 or 96-1536-4-128) and product_is" 2>&1 | tee "$out/$tool.txt"
    done
fi

for size in 128 -1; do
    python3 kernel.py --shapes 4096x4096 14336x4096 4096x14336 8192x28672 --group-size $size --out "$out/kernels$size"
done

for bits in 3 2; do
    for method in bcq flexround flexbcq; do
        python3 calibrate.py --method $method --bits $bits --epochs 20 --out "$out/tiny-$method-$bits" 2>> "$out/progress.txt"
        python3 eval.py --model "$out/tiny-$method-$bits" --prompt "def fibonacci(" | tail -1
    done
done 2>&1 | tee "$out/calibration.txt"
