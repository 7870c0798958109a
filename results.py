"""Make the measurements that RESULTS.md shows, and write it; what is on it stands in docs/page.py.

    python results.py                                      # on the bundled model: the ablation
    python results.py --model smollm2 --data wikitext-2    # on SmolLM2-135M too: the four methods

smollm2 is a Hugging Face folder; wikitext-2 holds wiki.valid.tokens (calibration) and wiki.test.raw (evaluation). A
measurement is one call of calibrate.py with the options that the page shows. Each is kept in docs/results.json as soon
as it is there and made only once, so this can be stopped and started again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock

import torch
import torch.nn.functional as F
from tqdm import tqdm

from blocks import Training, quantize_layers, train_block
from command import check_device, default_device, guarded
from docs import page
from llama import Checkpoint, rope_tables, write_json


def machine(device: str, threads: int) -> str:
    """The hardware, by name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s'[: threads > 1]}"


def measure(chosen: str, args: argparse.Namespace) -> dict:
    """Calibrate in a process of its own, into a folder that is deleted. Raises OSError with what it printed last."""
    threads = max(1, os.cpu_count() // args.jobs)
    texts = args.model and ["--text", args.data / "wiki.valid.tokens", "--eval-text", args.data / "wiki.test.raw"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        baselines = "--baselines" if chosen in page.with_original() else "--no-baselines"
        given = ["--model", args.model, *texts] if chosen.startswith(page.SETTING) else []
        call(
            [page.HERE / "calibrate.py", "--device", args.device, *given, *chosen.split(), baselines, "--out", out],
            threads,
        )
        report = json.loads((out / "calibration.json").read_text())
        blocks = report.pop("blocks")
        kept = ("perplexity", "bits_per_weight", "seconds", "cpu_seconds", "peak_bytes", "eval_windows", "versions")
        record = {key: report[key] for key in kept}
        if "moves" in blocks[0]:
            record["moves"] = [statistics.mean(shares) for shares in zip(*(block["moves"] for block in blocks))]
    return record | {"machine": machine(args.device, threads)}


def measure_step(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a training step of 512 tokens on block 0, and of the original block's share of it."""
    checkpoint, settings = Checkpoint(args.model), Training(epochs=1, n_ratios=1)
    rope = rope_tables(checkpoint.config, 512, args.device)
    x = torch.randn(16, 512, checkpoint.config.hidden_size)
    original, block = (checkpoint.block(0, device=args.device) for _ in range(2))
    original.requires_grad_(True)
    quantizers = [q for _, q in quantize_layers(checkpoint, block, 0, "flexbcq", *page.MAIN, settings)]

    def alone() -> None:
        for part in x.split(1):
            part = part.to(args.device)
            loss = F.mse_loss(original(part, *rope), part)
            loss.backward()
            loss.item()  # a GPU is waited for

    found = {"original": alone, "step": lambda: train_block(block, quantizers, (x, x), x, rope, settings, 0)}
    seconds = {}
    for name, steps in found.items():
        times = []
        for _ in range(4):
            start = time.perf_counter()
            steps()
            times.append((time.perf_counter() - start) / len(x))
        seconds[name] = 1000 * statistics.median(times[1:])
    return seconds | {"machine": machine(args.device, torch.get_num_threads())}


def call(command: list, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = list(map(str, command))
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        *_, last = "no error message", *done.stderr.strip().splitlines()
        raise OSError(f"{' '.join(command)}: exit code {done.returncode}, {last}")


def measure_all(store: dict, args: argparse.Namespace) -> None:
    """Fill the store with what it lacks, `args.jobs` runs side by side."""
    if args.model and "step" not in store:
        store["step"] = measure_step(args)
        write_json(page.STORE, store)
    missing = [chosen for chosen in page.wanted(bool(args.model)) if chosen not in store["runs"]][: args.runs]
    lock = Lock()

    def keep(chosen: str) -> None:
        record = measure(chosen, args)
        with lock:
            store["runs"][chosen] = record
            write_json(page.STORE, store)

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(keep, chosen) for chosen in missing]
        try:
            for future in tqdm(as_completed(futures), total=len(missing), unit="run", disable=not missing):
                future.result()
        finally:  # after an error, begin no other run; those that have begun are kept
            pool.shutdown(cancel_futures=True)


def run(args: argparse.Namespace) -> None:
    store = json.loads(page.STORE.read_text("utf-8")) if page.STORE.exists() else {"runs": {}}
    if args.model:
        names = "wiki.valid.tokens", "wiki.test.raw"
        if args.data is None or not all((args.data / name).is_file() for name in names):
            raise OSError(f"--data {args.data}: no folder with {' and '.join(names)}")
    if args.jobs < 1 or (args.runs or 0) < 0:
        raise ValueError(f"--jobs {args.jobs} --runs {args.runs}: at least 1 job and 0 runs")
    check_device(args.device)
    measure_all(store, args)
    if lacking := set(page.with_original()) - store["runs"].keys():
        raise OSError(f"{page.STORE}: too few runs for a page; make {min(lacking)} first (of SmolLM2: --model, --data)")
    page.write_page(store)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what RESULTS.md shows, as far as it is missing; write it.")
    add = parser.add_argument
    add("--model", type=Path, help="folder of SmolLM2-135M (default: measure the bundled model only)")
    add("--data", type=Path, help="folder with wiki.valid.tokens and wiki.test.raw")
    add("--jobs", type=int, default=1, help="runs side by side, sharing the cores (default: %(default)s)")
    add("--runs", type=int, help="make only so many (default: all that are missing)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
