"""Make the measurements that RESULTS.md shows, and write it; page.py says which they are and how they are shown.

    python -m experiments.results                                      # on the bundled model: the ablation
    python -m experiments.results --model smollm2 --data wikitext-2    # on SmolLM2-135M too: the methods
    python -m experiments.results --model smollm2 --data wikitext-2 --tasks DATA    # and their answers in tasks

smollm2 is a Hugging Face folder; wikitext-2 holds wiki.valid.tokens and wiki.test.joined.txt (see page.TEXT), DATA the
published files of BLiMP, LAMBADA and PIQA (see page.TASKS). A measurement is one call of calibrate.py with the options
that the page shows. Each is kept in experiments/results.json as soon as it is there and made only once, so this can be
stopped and started again, or run twice at the same time.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

from calibrate import Activations, quantize_layers, train_block
from experiments import page
from llama import rope_tables
from support.checkpoint import Checkpoint, write_json
from support.command import check_device, default_device, guarded
from support.settings import Settings


def blas() -> str:
    """Which instructions the matrix products of PyTorch use, as MKL tells it: on an AMD processor that has AVX-512 they
    are those of AVX2, and results differ in their last digits. Empty where PyTorch is built without MKL."""
    command = [sys.executable, "-c", "import torch; torch.ones(9, 9) @ torch.ones(9, 9)"]
    told = subprocess.run(command, env=os.environ | {"MKL_VERBOSE": "1"}, capture_output=True, text=True).stdout
    found = re.search(r"\(Intel\(R\) (AVX[\w-]*)\)", told)
    return f"MKL with {found[1]}, " if found else ""


def machine(device: str, threads: int) -> str:
    """The hardware, by name, and what its matrix products use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    plural = "thread" if threads == 1 else "threads"
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {blas()}{threads} {plural}"


def measure(chosen: str, model: Path | None, data: Path | None, tasks: Path | None, device: str, threads: int) -> dict:
    """Calibrate in a process of its own, into a folder that is deleted. Raises OSError with what it printed last.

    chosen: options of calibrate.py; model, data: for the runs on SmolLM2; tasks: for those that answer tasks too"""
    command = ["calibrate.py", "--device", device]
    if chosen.startswith(page.SETTING):
        command += ["--model", model, "--text", data / "wiki.valid.tokens", "--eval-text", data / page.TEXT]
    command += [*chosen.split(), "--baselines" if chosen in page.required() else "--no-baselines"]

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        call([*command, "--out", out], threads)
        record = kept(json.loads((out / "calibration.json").read_text()), machine(device, threads))
        if chosen in page.whole():
            record["whole"] = measure_whole(out, data, device, threads)
        if tasks and chosen in page.answering():
            record["tasks"] = measure_tasks(out, model, data, tasks, device, threads)
    return record


def kept(report: dict, measured_on: str) -> dict:
    """What the store keeps of a report of calibrate.py."""
    names = ("perplexity", "bits_per_weight", "seconds", "cpu_seconds", "peak_bytes", "eval_windows", "versions")
    record = {name: report[name] for name in names}
    record |= {"divergence": report["finish"]["divergence"]} if report.get("finish") else {}
    if "moves" in report["blocks"][0]:
        moves = zip(*(block["moves"] for block in report["blocks"]))
        record["moves"] = [statistics.mean(shares) for shares in moves]
    return record | {"machine": measured_on}


def measure_whole(folder: Path, data: Path, device: str, threads: int) -> float:
    """Perplexity on the whole test set, as eval.py prints it."""
    command = ["eval.py", "--model", folder, "--text", data / page.TEXT, "--seq-len", page.EVAL_SEQ_LEN]
    return float(call([*command, "--device", device], threads).split()[1])


def measure_tasks(folder: Path, original: Path | None, data: Path, tasks: Path, device: str, threads: int) -> dict:
    """What `experiments.tasks` finds, in a process of its own."""
    against = ["--against", original] if original else []
    with tempfile.TemporaryDirectory() as temporary:
        command = ["-m", "experiments.tasks", "--model", folder, *against, "--text", data / page.TEXT, "--data", tasks]
        call([*command, "--device", device, "--out", Path(temporary) / "tasks.json"], threads)
        return json.loads((Path(temporary) / "tasks.json").read_text())


def call(command: list, threads: int) -> str:
    """Run a program of this repository; returns what it prints. Raises OSError with its last line if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=page.ROOT)
    if done.returncode:
        *_, last = "no error message", *done.stderr.strip().splitlines()
        raise OSError(f"{' '.join(command[1:])}: exit code {done.returncode}, {last}")
    return done.stdout


def measure_step(model: Path, device: str) -> dict[str, float]:
    """Milliseconds of a training step of 512 tokens on block 0, and of the original block's share of it."""
    bits, group_size = page.MAIN
    settings = Settings(bits=bits, group_size=group_size, epochs=1, batch_size=1, samples=16, n_ratios=1)
    checkpoint = Checkpoint(model)
    block = checkpoint.block(0, device=device)
    original = checkpoint.block(0, device=device).requires_grad_(True)
    quantizers = list(quantize_layers(checkpoint, block, 0, settings).values())
    noise = torch.randn(16, 512, checkpoint.config.hidden_size)
    x = Activations(noise, noise, noise, rope_tables(checkpoint.config, 512, device))

    def original_alone() -> None:
        for part in noise.split(1):
            part = part.to(device)
            loss = F.mse_loss(original(part, *x.rope), part)
            loss.backward()
            loss.item()  # a GPU is waited for

    milliseconds = {}
    for name, steps in (
        ("original", original_alone),
        ("step", lambda: train_block(block, quantizers, x, settings, seed=0)),
    ):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            steps()
            times.append((time.perf_counter() - start) / len(noise))
        milliseconds[name] = 1000 * statistics.median(times[1:])
    return milliseconds | {"machine": machine(device, torch.get_num_threads())}


def read_store() -> dict:
    """All measurements made so far."""
    return json.loads(page.STORE.read_text("utf-8")) if page.STORE.exists() else {"runs": {}}


@contextmanager
def changing_store() -> Iterator[dict]:
    """The store as it is on the disk, written back at the end; meanwhile other jobs and processes wait to change it."""
    with FileLock(page.STORE.with_suffix(".lock")):
        store = read_store()
        yield store
        write_json(page.STORE, store)


def measure_all(
    model: Path | None, data: Path | None, tasks: Path | None, device: str, n_jobs: int, n_runs: int | None
) -> None:
    """Fill the store with what it lacks, at most n_runs, n_jobs of them side by side."""
    store, threads = read_store(), max(1, os.cpu_count() // n_jobs)
    if model and "step" not in store:
        step, digest = measure_step(model, device), hashlib.sha256((data / page.TEXT).read_bytes()).hexdigest()
        with changing_store() as store:
            store |= {"step": step, "sha256": digest}
    if model and "whole" not in store:
        found = measure_whole(model, data, device, threads)
        with changing_store() as store:
            store["whole"] = found
    if model and tasks and "tasks" not in store:
        found = measure_tasks(model, None, data, tasks, device, threads)
        with changing_store() as store:
            store["tasks"] = found

    def is_missing(chosen: str, runs: dict) -> bool:
        run = runs.get(chosen, {})
        lacks_whole = chosen in page.whole() and "whole" not in run
        return not run or lacks_whole or bool(tasks and chosen in page.answering() and "tasks" not in run)

    def keep(chosen: str) -> None:
        if not is_missing(chosen, read_store()["runs"]):
            return  # another process has made it since
        record = measure(chosen, model, data, tasks, device, threads)
        with changing_store() as store:
            store["runs"][chosen] = store["runs"].get(chosen, {}) | record

    missing = [chosen for chosen in page.wanted(with_model=bool(model)) if is_missing(chosen, store["runs"])][:n_runs]
    with ThreadPoolExecutor(n_jobs) as pool:
        futures = [pool.submit(keep, chosen) for chosen in missing]
        try:
            for future in tqdm(as_completed(futures), total=len(missing), unit="run", disable=not missing):
                future.result()
        finally:  # after an error start no other run; those that have started are kept
            pool.shutdown(cancel_futures=True)


def run(args: argparse.Namespace) -> None:
    # what was asked for
    folders = args.model, args.data, args.tasks
    model, data, tasks = (path and path.resolve() for path in folders)  # the runs start in another folder
    if model:
        names = "wiki.valid.tokens", page.TEXT
        if data is None or not all((data / name).is_file() for name in names):
            raise OSError(f"--data {args.data or ''}: give a folder with {' and '.join(names)}")
    if tasks and not all((tasks / path).exists() for path, _ in page.TASKS.values()):
        raise OSError(f"--tasks {args.tasks}: give a folder with {', '.join(path for path, _ in page.TASKS.values())}")
    if args.jobs < 1 or (args.runs or 0) < 0:
        raise ValueError(f"--jobs {args.jobs} --runs {args.runs}: at least 1 job and 0 runs")
    check_device(args.device)

    measure_all(model, data, tasks, args.device, args.jobs, args.runs)
    store = read_store()
    if lacking := set(page.required()) - store["runs"].keys():
        raise OSError(f"{page.STORE}: too few runs for a page; make {min(lacking)} first (of SmolLM2: --model, --data)")
    page.write_page(store)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what RESULTS.md shows, as far as it is missing; write it.")
    add = parser.add_argument
    add("--model", type=Path, help="folder of SmolLM2-135M (default: measure the bundled model only)")
    add("--data", type=Path, help=f"folder with wiki.valid.tokens and {page.TEXT}")
    add("--tasks", type=Path, help="folder with the files of the tasks (default: do not measure them)")
    add("--jobs", type=int, default=1, help="runs side by side, sharing the cores (default: %(default)s)")
    add("--runs", type=int, help="make only so many (default: all that are missing)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
