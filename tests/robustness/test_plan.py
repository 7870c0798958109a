"""What a run takes: the plan that is printed before it, its memory, and activations on a disk."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import FEW_STEPS, call, contents, edit_config
from safetensors.torch import load_file, save_file

from calibrate import main, quantize_layers
from flexbcq import FlexBCQLinear
from llama import linears
from support.checkpoint import Checkpoint
from support.settings import TINY, Settings


def test_dry_run_prints_the_plan_and_writes_nothing(toy, text, tmp_path):
    options = ["--model", toy, "--text", text, "--out", tmp_path / "out", *FEW_STEPS]
    result = call(main, *options, "--dry-run")
    assert result.code == 0 and list(tmp_path.iterdir()) == []
    for line in ("out: 0.001 GB of", "activations in memory: 0.000 GB of", "perplexity of the original on 4 windows: "):
        assert line in result.out
    assert result.out.splitlines()[-1].startswith("2 blocks of 8 steps, ")
    peak = float(re.search(r"cpu: ([0-9.]+) GB of .* at the peak", result.out)[1])
    assert 0.1 < peak < 10  # PyTorch and what the tests before have left


def test_wrong_rope_shows_in_the_plan(tmp_path):
    """The bundled model with positions that turn a thousand times as slowly."""
    perplexities = []
    for model in (TINY, edit_config(shutil.copytree(TINY, tmp_path / "model"), rope_theta=1e12)):
        options = ["--model", model, "--text", TINY / "train.py", "--seq-len", 128, "--method", "rtn", "--dry-run"]
        said = call(main, *options).out
        perplexities.append(float(said.split("perplexity of the original on")[1].split()[2]))
    assert perplexities[1] > 1.5 * perplexities[0]


def test_layers_that_need_most_memory_are_initialized_before_there_are_other_quantizers(toy):
    block, built = Checkpoint(toy).block(0), []
    names = list(linears(block))

    def see():
        built.append([name for name, layer in block.named_modules() if isinstance(layer, FlexBCQLinear)])

    quantizers = quantize_layers(Checkpoint(toy), block, 0, Settings(group_size=32), advance=see)
    assert list(quantizers) == names  # the order in which they are trained and stored
    assert built[0] == ["mlp.down_proj"]  # its Hessian is the largest
    assert sorted(built[2]) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]


def test_offloaded_activations_give_the_same_bytes_and_leave_no_file(toy, text, tmp_path):
    (tmp_path / "disk").mkdir()
    for name, offload in ("memory", []), ("offloaded", ["--offload", tmp_path / "disk"]):
        result = call(main, "--model", toy, "--text", text, "--out", tmp_path / name, *FEW_STEPS, *offload)
        assert result.code == 0, result.err
    assert contents(tmp_path / "offloaded") == contents(tmp_path / "memory")
    assert list((tmp_path / "disk").iterdir()) == []


def peak_megabytes(*options):
    """The largest resident memory of a calibration in a process of its own, mapped files included."""
    program = "import calibrate; calibrate.main(); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", program, *map(str, options)]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(text, tmp_path):
    """4, 16 and 64 random blocks of the bundled model's width."""
    peaks = {}
    for n_blocks in (4, 16, 64):
        model, out = shutil.copytree(TINY, tmp_path / f"model{n_blocks}"), tmp_path / f"out{n_blocks}"
        edit_config(model, num_hidden_layers=n_blocks)
        tensors = {}
        for name, t in load_file(TINY / "model.safetensors").items():
            if "layers" not in name:
                tensors[name] = t
            elif "layers.0" in name:
                noise = (torch.randn(t.shape).mul(0.02).to(t.dtype) for _ in range(n_blocks))
                tensors |= {name.replace("layers.0", f"layers.{i}"): x for i, x in enumerate(noise)}
        save_file(tensors, model / "model.safetensors")
        options = ["--samples", 2, "--epochs", 1, "--seq-len", 128, "--method", "flexround"]
        peaks[n_blocks] = peak_megabytes("--model", model, "--text", text, "--out", out, *options)
        print(
            f"{n_blocks} blocks, {(model / 'model.safetensors').stat().st_size / 1e6:.0f} MB: {peaks[n_blocks]:.0f} MB"
        )
    assert peaks[64] < 1.05 * peaks[4]
