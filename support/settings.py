"""Every option of calibrate.py and eval.py, once: its default, its range and its help.

The command lines, the checks, the report of a run, the check before it is resumed and the notebook all use these two
dataclasses. A field is an option: `bits` is `--bits`, and `Settings(bits=2)` is `--bits 2`. A new option is one line
here and the line that reads it.
"""

import argparse
import math
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from flexbcq import WITH_GPTQ
from support.command import default_device

TINY = Path(__file__).parent.parent / "models" / "tiny"
METAVAR = {int: "N", float: "X", Path: "PATH"}
FOUND = "cuda if there is one, else cpu"
HELD_OUT = 8  # samples that decide which state the finish keeps
PAPER = {  # what sets the method back to the paper's
    "n_ratios": 50,
    "n_rounds": 15,
    "level_rate": 5e-4,
    "importance": False,
    "learn_shift": False,
    "feedback_passes": 0,
    "finish_steps": 0,
}


def option(section: str, default: Any, text: str, low: float = -math.inf, high: float = math.inf, **more: Any):
    """A field with what the command line says about it.

    low, high: the range of a number, both ends included; more: choices, shown (the default in words)"""
    metadata = {"section": section, "text": text, "range": (low, high), **more}
    default = {"default_factory": default} if callable(default) else {"default": default}
    return field(**default, metadata=metadata)


files = partial(option, "input and output")
quantization = partial(option, "quantization")
calibration = partial(option, "calibration")
switch = partial(option, "switches, for ablations")
evaluation = partial(option, "evaluation")
machine = partial(option, "machine")
perplexity, generation, tasks = (partial(option, name) for name in ("perplexity", "text generation", "tasks"))
DECISIVE = {"quantization", "calibration", "switches, for ablations"}  # sections that decide every byte of the result


@dataclass(frozen=True)
class Settings:
    """How calibrate.py quantizes. None: as `shown` says; what depends on the method is filled in here, what depends on
    model or machine by `plan.resolve`.

    Settings(**PAPER) are those of the paper. Raises ValueError for a number out of its range."""

    model: Path = files(TINY, "folder, or org/name[@revision] on Hugging Face", shown="the bundled models/tiny")
    out: Path | None = files(None, "new folder to write", shown="MODEL-METHOD-BITSbit in the current folder")

    method: str = quantization("flexbcq", "how to quantize", choices=WITH_GPTQ)
    bits: int = quantization(3, "bits per weight, the number of bit-planes", 1, 8)
    group_size: int = quantization(-1, "weights that share alpha and shift, a multiple of 32; -1: a whole row")
    head_bits: int | None = quantization(
        None,
        "bits per weight of embedding and lm_head, with alpha and shift for each row; 8 bits do little harm",
        1,
        8,
        shown="left as they are",
    )
    dequantized: bool = quantization(False, "write ordinary weights instead of bit-planes, for other software")

    samples: int = calibration(128, "sequences that the blocks are trained on; the finish draws others", 1)
    seq_len: int | None = calibration(None, "tokens in each sequence", shown="2048, or the model's context if smaller")
    epochs: int | None = calibration(None, "passes over the samples", 1, shown="20, or 1 for the bundled model")
    batch_size: int | None = calibration(
        None, "sequences in a training step", 1, shown="1, or 1 per process with torchrun"
    )
    seed: int = calibration(0, "seed of the samples, their order and the mixing of inputs", 0, 2**32 - 1)

    mapping_rate: float = switch(5e-3, "learning rate of scale, s_elem and s_row, falling to 0 as a cosine", 0, 1)
    level_rate: float = switch(2e-3, "learning rate of alpha and shift in the blocks, falling to 0 as a cosine", 0, 1)
    period: int = switch(2, "training steps between two mappings of weights to levels", 1)
    local: bool = switch(True, "each new mapping moves a weight by at most one level")
    tau: float = switch(1.0, "no gradient where the level is further away than X times the smallest alpha", 0, 1e9)
    learn_shift: bool = switch(True, "train the shift like alpha in the blocks (the finish always does)")
    original_input: float = switch(0.5, "share of a block's inputs taken from the original model in training", 0, 1)
    n_ratios: int = switch(10, "clipping ratios that the initialization tries", 1)
    n_rounds: int = switch(8, "rounds of alternating update per ratio (0: start from uniform levels, like rtn)", 0)
    importance: bool = switch(True, "weight the errors of the initialization by the inputs of each layer")
    feedback_passes: int | None = switch(
        None, "passes of error feedback after the initialization", 0, shown="2 for bcq and flexbcq, 1 for gptq, else 0"
    )
    finish_steps: int | None = switch(
        None, "steps of end-to-end training of all alpha and shift at the end", 0, shown="128 for flexbcq, else 0"
    )
    finish_rate: float | None = switch(
        None,
        "learning rate of the finish, in units of each group's mean alpha",
        0,
        1,
        shown="1e-3; with --group-size N multiplied by min(1, N / 64 * 8^(3 - bits))",
    )

    text: Path | None = files(
        None, "UTF-8 file to calibrate on, or wikitext2 or c4 (training split)", shown="the Python standard library"
    )
    eval_text: Path | None = evaluation(
        None,
        "UTF-8 file for perplexity, or wikitext2 (test split) or c4 (1,100 documents), both joined as in GPTQ",
        shown="the test split (c4: validation) or last tenth of --text, or held-out library files",
    )
    eval_seq_len: int | None = evaluation(None, "tokens per window", shown="as --seq-len")
    eval_windows: int | None = evaluation(None, "use only the first N windows", 1, shown="all")
    baselines: bool = evaluation(True, "measure the original model and rtn too")

    device: str | torch.device = machine(default_device, "cpu, cuda, cuda:1, ...", shown=FOUND)
    offload: Path | None = machine(None, "keep activations in this folder on a disk", shown="in memory")
    dry_run: bool = machine(False, "check everything, print what a run takes, and stop")

    def __post_init__(self):
        check_ranges(self)
        passes, steps = {"gptq": (1, 0), "bcq": (2, 0), "flexbcq": (2, 128)}.get(self.method, (0, 0))
        rate = 1e-3  # less where a step is more noise than signal: few weights share an alpha, and little is wrong
        if self.group_size > 0:
            rate *= min(1, self.group_size / 64 * 8 ** (3 - self.bits))
        for name, default in (("feedback_passes", passes), ("finish_steps", steps), ("finish_rate", rate)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)  # the dataclass is frozen; this is still its constructor

        if self.method == "rtn" and self.feedback_passes:
            raise ValueError("--method rtn --feedback-passes: rtn with error feedback is --method gptq")
        if self.method == "gptq" and not self.feedback_passes:
            raise ValueError(
                "--method gptq: without error feedback it is --method rtn; leave out --feedback-passes 0, or --paper"
            )
        if self.feedback_passes > 1 and not WITH_GPTQ[self.method][1]:
            raise ValueError(
                f"--feedback-passes {self.feedback_passes}: the levels of {self.method} are fixed, 1 is enough"
            )
        if self.finish_steps and not WITH_GPTQ[self.method][1]:
            raise ValueError(f"--finish-steps {self.finish_steps}: the levels of {self.method} are not trained")

    @property
    def is_trained(self) -> bool:
        """A learned mapping needs gradients; rtn, gptq and bcq are done when they are initialized."""
        return WITH_GPTQ[self.method][0]

    @property
    def n_steps(self) -> int:
        """Training steps of a block."""
        return self.epochs * self.samples // self.batch_size if self.is_trained else 0

    def decisive(self) -> dict[str, Any]:
        """The options that, with model and text, decide the result: what config.json and a resumed run keep."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["section"] in DECISIVE}


@dataclass(frozen=True)
class Evaluation:
    """What eval.py measures. Raises ValueError for a number out of its range."""

    model: Path = files(
        TINY, "folder, original or packed, or org/name[@revision] on Hugging Face", shown="the bundled models/tiny"
    )
    device: str | torch.device = files(default_device, "cpu, cuda, cuda:1, ...", shown=FOUND)

    text: Path | None = perplexity(
        None, "UTF-8 file to measure on, or wikitext2 or c4", shown="held-out files of the Python standard library"
    )
    seq_len: int | None = perplexity(
        None,
        "tokens per window; with --task or --mmlu the maximum per item (longer items lose their beginning)",
        shown="2048, or the model's context if smaller",
    )
    against: Path | None = perplexity(
        None, "also measure the distance from this original model: KL divergence, same most likely token"
    )

    prompt: str | None = generation(None, "continue this text instead, and print tokens per second")
    tokens: int = generation(100, "tokens to generate", 1)
    temperature: float = generation(
        0.0, "sample each token, from logits divided by X", 0, 1e9, shown="0: take the most likely"
    )
    seed: int = generation(0, "seed of the sampling", 0, 2**32 - 1)
    chat: bool = generation(False, "treat the prompt as a question to an assistant: apply the chat template")

    task: Path | None = tasks(None, "a .jsonl file of BLiMP, LAMBADA, PIQA or ARC, or a folder of them")
    mmlu: Path | None = tasks(None, "MMLU, answered by letter: its published folder, with dev and test")
    cloze: bool = tasks(False, "score MMLU by the texts of the answers instead, without shots")
    shots: int = tasks(5, "solved examples shown before each MMLU question", 0)
    limit: int | None = tasks(None, "use only the first N items of each file or subject", 1, shown="all")

    def __post_init__(self):
        check_ranges(self)


def flag(name: str) -> str:
    """The option of a field.

    >>> flag("group_size")
    '--group-size'"""
    return "--" + name.replace("_", "-")


def check_ranges(settings: Settings | Evaluation) -> None:
    """Raises ValueError naming the option whose number is out of its range."""
    for f in fields(settings):
        value, (low, high) = getattr(settings, f.name), f.metadata["range"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            wanted = f"choose {low} to {high}" if high < math.inf else f"must be at least {low}"
            raise ValueError(f"{flag(f.name)} {value}: {wanted}")


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """One option for each field, by sections. What is not given is left out, so that the dataclass sets its default."""
    groups = {}
    for f in fields(settings):
        section = f.metadata["section"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)

        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction if f.default else "store_true"}
        else:
            kind = {"type": (get_args(f.type) or (f.type,))[0], "choices": f.metadata.get("choices")}
            kind["metavar"] = METAVAR.get(kind["type"])

        default = f.metadata.get("shown", f.default)
        text = f.metadata["text"]
        if default is not None and default is not False:
            text += f" (default: {default})"
        groups[section].add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
