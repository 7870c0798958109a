"""Running a command line inside this process, perplexity from scratch with `transformers`, folders changed and read."""

import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.resume import REPORT

FEW_STEPS = ["--samples", "8", "--epochs", "2", "--batch-size", "2", "--group-size", "32"]  # of calibrate.py


class Result(NamedTuple):
    """How a program ended, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


def call(main, *arguments) -> Result:
    """Run `main` with these command line arguments; an exception other than SystemExit is a traceback and passes on."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["prog", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def perplexity_by_transformers(folder, windows) -> float:
    """Each window alone, the mean of its token losses, the exponential of the mean over windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        losses = [F.cross_entropy(model(w[None]).logits[0, :-1], w[1:]).item() for w in windows]
    return math.exp(sum(losses) / len(losses))


def edit_config(folder, **changes):
    """Change fields of a folder's config.json; returns the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_tensors(folder, change):
    """Call `change` with the tensors of a folder's only weight file, by name, and write them back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def snapshot(folder):
    """{path: bytes} of all files below."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def blocks_finished(out):
    """Of an interrupted or running calibration to the folder `out`."""
    report = out.with_name(out.name + ".partial") / REPORT
    return len(json.loads(report.read_text())["blocks"]) if report.exists() else 0


def contents(folder):
    """{name: bytes} of the files of a finished calibration, and its report without times and memory."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop(REPORT))
    del report["seconds"], report["cpu_seconds"], report["peak_bytes"]
    for block in report["blocks"]:
        del block["seconds"], block["initializing"], block["training"]
    report.get("finish", {}).pop("seconds", None)
    return files | report
