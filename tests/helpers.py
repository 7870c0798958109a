"""Running a command line inside this process, and perplexity from scratch with `transformers`."""

import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from support.resume import REPORT


def call(main, *arguments) -> SimpleNamespace:
    """Run `main` with these command line arguments; an exception other than SystemExit is a traceback and passes on."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["prog", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def perplexity_by_transformers(folder, windows) -> float:
    """Each window alone, the mean of its token losses, the exponential of the mean over windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        losses = [F.cross_entropy(model(w[None]).logits[0, :-1], w[1:]).item() for w in windows]
    return math.exp(sum(losses) / len(losses))


def snapshot(folder):
    """{path: bytes} of all files below."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def blocks_finished(out):
    """Of an interrupted or running calibration to the folder `out`."""
    report = out.with_name(out.name + ".partial") / REPORT
    return len(json.loads(report.read_text())["blocks"]) if report.exists() else 0
