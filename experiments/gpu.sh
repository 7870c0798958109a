#!/usr/bin/env bash
# What there is to learn on a GPU: are the kernels right, do they stay inside their memory, how fast are they, what does
# calibration cost, what does a large model take. From the root of the repository:
#
#     bash experiments/gpu.sh FOLDER [check|sanitize|kernels|tiny2|tiny3|large|decode ..]      # default: all of them
#
# FOLDER/report.txt is what they print, FOLDER/progress.txt the progress bars and errors. A part takes some minutes.
set -euo pipefail
out=${1:?usage: bash experiments/gpu.sh FOLDER [PART ..]}
mkdir -p "$out"
if [ $# -ne 2 ]; then # each part in a process of its own: one that fails does not end the others
    parts=${*:2}
    for part in ${parts:-check sanitize kernels tiny2 tiny3 large decode}; do
        bash "$0" "$out" "$part" || echo "$part FAILED, see progress.txt" | tee -a "$out/report.txt"
    done
    exit
fi
[ -e "${CUDA_HOME:-}/include/cuda_runtime_api.h" ] || export CUDA_HOME=/usr/local/cuda
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check() { # without a compiled kernel the tests would skip it, and all that follows would measure plain PyTorch
    nvidia-smi --query-gpu=name,driver_version --format=csv
    python3 -c "from kernel import paths; assert 'cuda' in paths('cuda'), 'kernel.cu was not compiled'"
    python3 -m pytest -q tests/robustness/test_multiply.py tests/robustness/test_cuda.py tests/test_flexbcq.py
}

sanitize() { # a shape that only the readable kernel takes, and one that both take; this slows a kernel down a hundredfold
    for tool in memcheck racecheck; do # without PyTorch's cache, which would give an overrun a place to land
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 --report-api-errors no \
            --kernel-name kns=readable_kernel,kns=fast_kernel,kns=prepare_x \
            python3 -m pytest -q tests/robustness/test_multiply.py \
            -k "(cuda or fast or readable) and (33-576-3-64 or 96-1536-4-128) and product_is"
    done
}

kernels() {
    for size in 128 -1; do
        python3 -m experiments.kernels --shapes 4096x4096 14336x4096 4096x14336 8192x28672 --group-size $size --out "$out/kernels$size"
    done
}

tiny() { # the bundled model at the paper's number of epochs
    for method in bcq flexround flexbcq; do
        baselines=$([ $method = bcq ] && echo --baselines || echo --no-baselines)
        python3 calibrate.py --method $method --bits "$1" --epochs 20 $baselines --out "$work/$method"
        python3 eval.py --model "$work/$method" --prompt "def fibonacci(" | tail -1
    done
}
tiny2() { tiny 2; }
tiny3() { tiny 3; }

large() { # one block: seconds a step, the peak of the card's memory
    for size in 8B 70B; do
        python3 -m experiments.large_block $size "$work/$size"
        python3 calibrate.py --model "$work/$size" --group-size 128 --seq-len 2048 --offload "$work" --dry-run
    done
}

decode() { # a quarter of the blocks of Llama-3-8B and its vocabulary, in bfloat16 and at 3 bits
    python3 -m experiments.large_block 8B "$work/original" --blocks 8
    python3 calibrate.py --model "$work/original" --method rtn --group-size 128 --samples 4 --seq-len 128 \
        --eval-windows 1 --no-baselines --out "$work/packed"
    for model in original packed; do
        python3 eval.py --model "$work/$model" --prompt "def" | tail -1
    done
}

{ echo "== $2" && "$2"; } 2>> "$out/progress.txt" | tee -a "$out/report.txt"
