#!/usr/bin/env bash
# What there is to learn on a GPU: are the kernels right, do they stay inside their memory, how fast are they, what does
# calibration cost, what does a large model take. From the root of the repository:
#
#     bash experiments/gpu.sh FOLDER [check|sanitize|kernels|prompts|tiny2|tiny3|two|large|graph ..]   # default: all
#
# FOLDER/report.txt is what they print, FOLDER/progress.txt the progress bars and errors. A part takes some minutes.
# Each ends with what was expected; what is said there of an H100 is arithmetic.
set -euo pipefail
out=${1:?usage: bash experiments/gpu.sh FOLDER [PART ..]}
mkdir -p "$out"
if [ $# -ne 2 ]; then # each part in a process of its own: one that fails does not end the others
    parts=${*:2}
    for part in ${parts:-check sanitize kernels prompts tiny2 tiny3 two large graph}; do
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
    python3 -m pytest -q tests/robustness/test_multiply.py tests/robustness/test_cuda.py tests/robustness/test_graph.py \
        tests/test_flexbcq.py
    echo "expected: all pass, none that needs a GPU is skipped"
}

sanitize() { # shapes for both kernels, and long prompts; this slows a kernel down a hundredfold
    for tool in memcheck racecheck; do # without PyTorch's cache, which would give an overrun a place to land
        for name in _kernel prepare_x; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 --report-api-errors no \
                --kernel-name kns=$name \
                python3 -m pytest -q tests/robustness/test_multiply.py tests/robustness/test_cuda.py \
                -k "(cuda or fast or readable) and (33-576-3-64 or 33-1536-4-128) and product_is or long_prompt"
        done
    done
    echo "expected: no error, four times"
}

kernels() {
    for size in 128 -1; do
        python3 -m experiments.kernels --shapes 4096x4096 14336x4096 4096x14336 8192x28672 --group-size $size \
            --out "$out/kernels$size"
    done
    echo "expected: 3 bits, groups of 128, one token: on an H100 at most 34 % of read, 57, 67 and 87 (the shapes in this"
    echo "order), on an A100 49, 68, 76 and 90"
}

prompts() { # up to 64 tokens 8 at a time, more by writing the weight down
    python3 -m experiments.kernels --shapes 8192x28672 4096x4096 --bits 3 --batch 8 64 72 512 --out "$out/prompts"
    echo "expected: an H100, 8192x28672: about 45, 350, 400 and 600 us. If 72 takes much less than 64, or much more,"
    echo "FEW_ON_GPU in kernel.cpp is to be changed"
}

tiny() { # the bundled model at the paper's number of epochs
    for method in bcq flexround flexbcq; do
        baselines=$([ $method = bcq ] && echo --baselines || echo --no-baselines)
        python3 calibrate.py --method $method --bits "$1" --epochs 20 $baselines --out "$work/$method"
        python3 eval.py --model "$work/$method" --prompt "def fibonacci(" | tail -1
    done
}
tiny2() { tiny 2 && echo "expected: perplexities within 2 % of those of a CPU"; }
tiny3() { tiny 3 && echo "expected: perplexities within 1 % of those of a CPU"; }

two() { # on one card each if there are two (NCCL), else on the CPU (gloo, on a machine that has a GPU); and one process
    device=$([ "$(nvidia-smi --list-gpus | wc -l)" -ge 2 ] && echo cuda || echo cpu)
    options="--device $device --samples 16 --batch-size 2 --feedback-passes 0 --finish-steps 0 --no-baselines"
    torchrun --standalone --nproc-per-node 2 calibrate.py $options --out "$work/two"
    python3 calibrate.py $options --out "$work/one"
    grep -h loss_after "$work/two/calibration.json" "$work/one/calibration.json"
    echo "expected: the losses of both agree to 1 %"
}

large() { # one block: seconds a step, the peak of the card's memory
    for size in 8B 70B; do
        python3 -m experiments.large_block $size "$work/$size"
        python3 calibrate.py --model "$work/$size" --group-size 128 --seq-len 2048 --offload "$work" --dry-run
    done
    echo "expected: an H100: 0.04 seconds a step and 9.0 GB (8B), 0.14 seconds and 33 GB (70B)"
}

graph() { # a quarter of the blocks of Llama-3-8B and its vocabulary, in bfloat16 and at 3 bits
    python3 -m experiments.large_block 8B "$work/original" --blocks 8
    python3 calibrate.py --model "$work/original" --method rtn --group-size 128 --samples 4 --seq-len 128 \
        --eval-windows 1 --no-baselines --out "$work/packed"
    python3 -m experiments.decode "$work/packed" "$work/original" --prompt 16 --out "$out/graph"
    echo "expected: an H100, each token launched from Python: some 450 tokens/s at 16 bits and 600 to 800 at 3, where"
    echo "launching takes longer than the kernels; replayed as a CUDA graph: 480 and 800"
}

{ echo "== $2" && "$2"; } 2>> "$out/progress.txt" | tee -a "$out/report.txt"
