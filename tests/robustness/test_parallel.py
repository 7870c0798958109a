"""Several processes under torchrun do what one does, and so do several threads. (With gloo on the CPU; NCCL is the same
code on GPUs.)"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import blocks_finished, call

from calibrate import main

pytestmark = pytest.mark.slow
SETTINGS = ["--samples", "8", "--epochs", "2", "--batch-size", "4", "--bits", "3", "--group-size", "32"]


def torchrun_command(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "calibrate.py", *map(str, arguments)]


def torchrun(*arguments):
    return subprocess.run(torchrun_command(*arguments), capture_output=True, text=True)


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_two_processes_give_the_losses_of_one(toy, text, tmp_path):
    for name, run in (("one", lambda *a: call(main, *a)), ("two", torchrun)):
        run("--model", toy, "--text", text, "--out", tmp_path / name, *SETTINGS)
    one, two = (json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("one", "two"))
    for a, b in zip(one["blocks"], two["blocks"], strict=True):
        for key in ("loss_before", "loss_after"):
            assert a[key] == pytest.approx(b[key], rel=1e-3)
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-3)
    assert one["settings"] == two["settings"] and sorted(os.listdir(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--bits", "9"], "--bits 9: choose 1 to 8"),
        (
            ["--batch-size", "1"],
            "--batch-size 1: must divide --samples 8, and the number of processes (2) must divide it",
        ),
    ],
)
def test_error_of_all_processes_is_one_line(options, message, toy, text, tmp_path):
    result = torchrun("--model", toy, "--text", text, "--out", tmp_path / "out", *SETTINGS, *options)
    assert result.returncode and len(errors(result)) == 1 and message in errors(result)[0], result.stderr
    assert list(tmp_path.iterdir()) == []


def test_death_of_one_process_ends_all_with_one_line_and_finished_blocks_are_kept(toy, text, tmp_path):
    options = ["--model", toy, "--text", text, "--out", tmp_path / "out", *SETTINGS, "--epochs", "20"]
    with subprocess.Popen(torchrun_command(*options), stderr=subprocess.PIPE, text=True) as launcher:
        while blocks_finished(tmp_path / "out") < 1:
            time.sleep(0.01)
        processes = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(processes[-1]), signal.SIGKILL)  # that of rank 1
        lines = [line for line in launcher.stderr.read().splitlines() if line.startswith("error: ")]
    assert launcher.returncode and len(lines) <= 1 and os.listdir(tmp_path) == ["out.partial"]
    assert torchrun(*options).returncode == 0 and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("method", ["bcq", "flexbcq"])
def test_one_and_two_threads_give_the_same_bytes(method, text, tmp_path):
    """The bundled model, whose layers are large enough to be shared among threads."""
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            options = ["--text", text, "--out", tmp_path / str(n), "--samples", 2, "--method", method]
            assert call(main, *options).code == 0
    finally:
        torch.set_num_threads(before)
    for shard in (tmp_path / "1").glob("*.safetensors"):
        assert (tmp_path / "2" / shard.name).read_bytes() == shard.read_bytes()
