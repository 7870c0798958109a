"""The measurements of RESULTS.md, and the page itself.

    python results.py                                      # on the bundled model: the ablation
    python results.py --model smollm2 --data wikitext-2    # on SmolLM2-135M too: the four methods

smollm2 is a Hugging Face folder; wikitext-2 holds wiki.valid.tokens (calibration) and wiki.test.raw (evaluation). A
measurement is one call of calibrate.py with the options that the page shows. Each is kept in docs/results.json as soon
as it is there and made only once, so this can be stopped and started again.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from blocks import Training, quantize_layers, train_block
from eval import check_device, default_device, guarded
from flexbcq import METHODS, FlexBCQLinear
from llama import Checkpoint, rope_tables, whole_file, write_json

HERE = Path(__file__).parent
STORE, PLOT, PAGE = HERE / "docs" / "results.json", HERE / "docs" / "ablation.png", HERE / "RESULTS.md"
README, MARKS = HERE / "README.md", ("<!-- table -->\n\n", "\n<!-- end of table -->\n")  # of the main table
SAMPLES, EPOCHS = 24, 2  # so many steps a block are their product
SETTING = f"--samples {SAMPLES} --seq-len 512 --epochs {EPOCHS} --eval-seq-len 2048"  # of SmolLM2
FEW, WHOLE = "--eval-windows 8 ", ""  # of the test set
CELLS = [(bits, group_size) for bits in (3, 2, 4) for group_size in (64, -1)]
SEEDED = (3, 64)  # the cell with three seeds, and with the whole test set
SEEDS = ["--seed 1", "--seed 2"]  # besides 0
ABLATED = "--samples 64"  # of the bundled model, which takes a minute a run
ABLATED_BITS = (2, 3)


def options(method: str, bits: int, group_size: int, windows: str = FEW, seed: str = "") -> str:
    """Of a run on SmolLM2."""
    return f"{SETTING} {windows}--method {method} --bits {bits} --group-size {group_size} {seed}".strip()


def ablation(bits: int, switch: str = "") -> str:
    """Options of a run on the bundled model."""
    return f"{ABLATED} --bits {bits} {switch}".strip()


def with_original() -> list[str]:
    """The runs that measure the original and rtn too."""
    return [options("rtn", *SEEDED), options("rtn", *SEEDED, WHOLE), *map(ablation, ABLATED_BITS)]


def ablations() -> dict[str, list[str]]:
    """Question -> switches that answer it."""
    return {
        "gradient filtering": ["--tau 1e9", "--tau 0.5", "--tau 2", "--tau 4"],
        "mapping": ["--period 1", "--period 4", "--period 8", "--no-local"],
        "initialization": ["--n-rounds 0", "--n-ratios 1", "--n-ratios 50", "--no-importance"],
        "training": ["--no-learn-shift", "--level-rate 0", "--level-rate 0.005", "--mapping-rate 0.0025"]
        + ["--mapping-rate 0.01", "--original-input 0"],
        "calibration": ["--samples 16 --epochs 4", "--samples 128", "--epochs 2", "--epochs 4", "--epochs 8"],
    }


def wanted(with_model: bool = True) -> list[str]:
    """The options of every run; without SmolLM2, of those on the bundled model."""
    switches = ["", *SEEDS, *(switch for group in ablations().values() for switch in group)]
    bundled = [ablation(bits, switch) for bits in ABLATED_BITS for switch in switches]
    table = [options(method, *cell) for cell in CELLS for method in METHODS]
    seeds = [options(method, *SEEDED, FEW, seed) for seed in SEEDS for method in METHODS if method != "rtn"]
    whole = [options(method, *SEEDED, WHOLE) for method in METHODS]
    return bundled + (table + seeds + whole) * with_model


# ---------------------------------------------------------------------------------------------------- measuring


def machine(device: str, threads: int) -> str:
    """The hardware, by name."""
    if device != "cpu":
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
        baselines = "--baselines" if chosen in with_original() else "--no-baselines"
        given = ["--model", args.model, *texts] if chosen.startswith(SETTING) else []
        call(["calibrate.py", "--device", args.device, *given, *chosen.split(), baselines, "--out", out], threads)
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
    quantizers = [q for _, q in quantize_layers(checkpoint, block, 0, "flexbcq", *SEEDED, settings)]

    def alone() -> None:
        for part in x.split(1):
            part = part.to(args.device)
            F.mse_loss(original(part, *rope), part).backward()

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


def call(command: list, threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = list(map(str, command))
    done = subprocess.run([sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def measure_all(store: dict, args: argparse.Namespace) -> None:
    """Fill the store with what it lacks, `args.jobs` runs side by side."""
    if args.model and "step" not in store:
        store["step"] = measure_step(args)
        write_json(STORE, store)
    missing = [chosen for chosen in wanted(bool(args.model)) if chosen not in store["runs"]][: args.runs]

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(measure, chosen, args): chosen for chosen in missing}
        try:
            for future in tqdm(as_completed(futures), total=len(missing), unit="run"):
                store["runs"][futures[future]] = future.result()
                write_json(STORE, store)
        finally:  # after an error, begin no other
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------- the page


def lines(*rows: tuple) -> str:
    """A markdown table; the first row is its head, the first column is text."""
    line = ("---",) + ("---:",) * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], line, *rows[1:]))


def perplexity(runs: dict, chosen: str, model: str) -> float | None:
    """Of "original" or a method, in one run; None if it was not measured."""
    return runs[chosen]["perplexity"].get(model) if chosen in runs else None


def values(runs: dict, method: str, cell: tuple[int, int], windows: str) -> list[float]:
    """Perplexities of a cell of the table, a value per seed."""
    found = [perplexity(runs, options(method, *cell, windows, seed), method) for seed in ("", *SEEDS)]
    return [value for value in found if value is not None]


def shown(found: list[float], best: bool) -> str:
    if not found:
        return ""
    text = f"{statistics.mean(found):,.{1 if found[0] > 100 else 2}f}"
    text = f"**{text}**" if best else text
    return text + (f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else "")


def name_of(bits: int, group_size: int) -> str:
    return f"{bits} bits, " + ("a row" if group_size == -1 else f"groups of {group_size}")


def main_table(runs: dict) -> str:
    """Perplexities, the lowest of a full line in bold, and a sentence on who has it and how clearly."""
    rows, margins = [("perplexity", "bits per weight", *METHODS)], {}
    for cell, windows in [*((cell, FEW) for cell in sorted(CELLS, reverse=True)), (SEEDED, WHOLE)]:
        found = {method: values(runs, method, cell, windows) for method in METHODS}
        measured = {method: statistics.mean(v) for method, v in found.items() if v}
        if measured:
            best, name = None, name_of(*cell) + (", whole test set" if windows == WHOLE else "")
            if len(measured) == len(METHODS):
                best, second, *_ = sorted(measured, key=measured.get)
                margins[name] = (measured[second] / measured[best] - 1, best)
            stored = runs[options(next(iter(measured)), *cell, windows)]["bits_per_weight"]
            rows.append((name, f"{stored:.2f}", *(shown(found[m], m == best) for m in METHODS)))
    seeds = values(runs, "flexbcq", SEEDED, FEW)
    if not (margins and seeds):
        return lines(*rows)
    won, narrowest = [best for _, best in margins.values()].count("flexbcq"), min(margins, key=margins.get)
    return f"""{lines(*rows)}

The lowest is flexbcq's in {won} of {len(margins)} full lines. The narrowest margin is {margins[narrowest][0]:.1%}
({narrowest}); between its seeds flexbcq varies by {max(seeds) / min(seeds) - 1:.1%}."""


def cost_table(runs: dict) -> str:
    rows = [("minutes (peak memory)", *METHODS)]
    for cell in sorted(CELLS, reverse=True):
        cells = [runs.get(options(method, *cell)) for method in METHODS]
        cost = [f"{run['cpu_seconds'] / 60:.1f} ({run['peak_bytes'] / 1e9:.1f} GB)" if run else "" for run in cells]
        if any(cost):
            rows.append((name_of(*cell), *cost))
    return lines(*rows)


def ablated(runs: dict, bits: int, switch: str = "") -> tuple[float, float]:
    """Perplexity on the bundled model, and how much it is above the default's; NaN where a run is missing."""
    found = [perplexity(runs, ablation(bits, s), "flexbcq") or math.nan for s in (switch, "")]
    return found[0], found[0] / found[1] - 1


def ablation_table(runs: dict) -> str:
    rows = [("", "switch", *(f"{bits} bits" for bits in ABLATED_BITS))]
    for question, switches in ({"default": [""]} | ablations() | {"chance": SEEDS}).items():
        for switch in switches:
            found = [ablated(runs, bits, switch) for bits in ABLATED_BITS]
            shares = ["" if math.isnan(value) else f"{value:.2f} ({share:+.1%})" for value, share in found]
            rows.append((question, switch and f"`{switch}`", *shares))
    return lines(*rows)


def parameter_table() -> str:
    """What is learned in a layer of SmolLM2's MLP, counted in the modules themselves."""
    rows = [("", "per weight, a row", "per weight, groups of 64", "learning rate", "after the fold")]
    layers = [FlexBCQLinear(torch.randn(1536, 576), 3, size, n_ratios=1, n_rounds=1) for size in (-1, 64)]
    fate = {"alpha": "3 in fp16", "shift": "1 in fp16", "log_scale": "in alpha, shift", "log_s_row": "in alpha, shift"}
    for name, _ in layers[0].named_parameters():
        learned = [getattr(layer, name).numel() / layer.w.numel() for layer in layers]
        rate = Training.level_rate if name in ("alpha", "shift") else Training.mapping_rate
        rows.append((name, *(f"{n:.4f}" for n in learned), f"{rate:g}", fate.get(name, "in the codes")))
    return lines(*rows)


def plots(runs: dict) -> None:
    """Perplexity against period and tau, and how far codes moved."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    colors = {2: "#0072B2", 3: "#D55E00", 4: "#009E73"}
    for axes, switch in zip(panels, ("period", "tau")):
        given = [s.split()[1] for group in ablations().values() for s in group if s.startswith(f"--{switch} ")]
        ticks = {float(x): f"--{switch} {x}" for x in given} | {float(getattr(Training, switch)): ""}
        places = {x: min(x, 16) for x in sorted(ticks)}  # no filtering, 1e9, stands at 16
        for bits in ABLATED_BITS:
            y = [100 * ablated(runs, bits, ticks[x])[1] for x in places]
            axes.plot(places.values(), y, "o-", color=colors[bits], label=f"{bits} bits")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(places.values()), ["none" if x > 16 else f"{x:g}" for x in places])
        axes.set(xlabel={"period": "period p, steps", "tau": "no gradient beyond tau * min |alpha|"}[switch])
        axes.set(ylabel="perplexity above the default's, %", title="bundled model, a row")
        axes.legend()
    panels[0].sharey(panels[1])
    for bits, color in colors.items():
        if run := runs.get(options("flexbcq", bits, -1)):
            shares = [(distance + 0.25 * (bits - 3), share) for distance, share in enumerate(run["moves"]) if share]
            panels[2].bar(*zip(*shares), width=0.22, color=color, label=f"{bits} bits")
    panels[2].set(xlabel="levels that a weight moved in training", ylabel="share of the weights", yscale="log")
    panels[2].set(title="moves of the codes, SmolLM2, a row")
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    panels[2].legend()
    with whole_file(PLOT) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def summary(runs: dict) -> str:
    few, whole = (perplexity(runs, options("rtn", *SEEDED, windows), "original") for windows in (FEW, WHOLE))
    end = f" ({whole:.2f} on the whole test set)" if whole else ""
    return f"{main_table(runs)}\n\nThe original, as a 4-bit GGUF file holds it, widened to bf16, has {few:.2f}{end}.\n"


def page(store: dict) -> str:
    runs, step = store["runs"], store["step"]
    first, bundled = runs[options("rtn", *SEEDED)], [runs[ablation(bits)] for bits in ABLATED_BITS]
    machines = sorted({run["machine"] for run in runs.values()})
    missing = len([chosen for chosen in wanted() if chosen not in runs])
    return f"""# Results

Written by `results.py`; every number below is from a run of `calibrate.py` with the options named here, kept in
`docs/results.json`. {f"{missing} of {len(wanted())} runs are still to be made." if missing else "All runs were made."}

SmolLM2-135M-Instruct (30 blocks, 106 million weights quantized) on WikiText-2: perplexity on the first
{first["eval_windows"]} windows of 2,048 tokens of the test set. Calibration on the validation set, the same samples and
steps for every method:

    python calibrate.py --model smollm2 --text wiki.valid.tokens --eval-text wiki.test.raw \\
        {SETTING} {FEW}\\
        --method METHOD --bits BITS --group-size SIZE

That is {EPOCHS * SAMPLES} steps of one sequence of 512 tokens a block, 2 % of the paper's 2,560 on sequences a quarter
as long: a comparison at equal cost, not the end of the road. Seed 0; where a range is given, the mean of seeds 0, 1, 2.
Measured on {"; ".join(machines)}; torch {first["versions"]["torch"]}.

## The four methods

{summary(runs)}
What a run costs in processor time, with checks and evaluation:

{cost_table(runs)}

## What each part of FlexBCQ contributes

On the bundled model, one thing changed at a time: `python calibrate.py {ABLATED} --bits BITS SWITCH`, a minute each on
a laptop. Perplexity, and what it is above the default's. The original has {bundled[0]["perplexity"]["original"]:.2f};
rtn has {" and ".join(f"{run['perplexity']['rtn']:.2f}" for run in bundled)}. Differences like those between
seeds, in the last two lines, say nothing.

{ablation_table(runs)}

![Perplexity against the period and the threshold of filtering; how far codes moved](docs/ablation.png)

## Where the time goes

A training step of 512 tokens on block 0 at {name_of(*SEEDED)} takes {step["step"]:.0f} ms
({1000 / step["step"]:.1f} steps/s) on {step["machine"]}. Forward and backward of the original block alone take
{step["original"]:.0f} ms, {step["original"] / step["step"]:.0%} of it; the rest is the quantizer and Adam.

## What is learned

A layer of 1,536 x 576 at 3 bits. Nothing but bit-planes, alpha and shift remains: k + 16 (k + 1) / group_size bits per
weight.

{parameter_table()}
"""


def write_page(store: dict) -> None:
    plots(store["runs"])
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(store), "utf-8")
    before, _, after = re.split("|".join(MARKS), README.read_text("utf-8"))
    with whole_file(README) as temporary:
        temporary.write_text(before + MARKS[0] + summary(store["runs"]) + MARKS[1] + after, "utf-8")
    print(f"wrote {PAGE.name} and the table in {README.name}")


def run(args: argparse.Namespace) -> None:
    store = json.loads(STORE.read_text("utf-8")) if STORE.exists() else {"runs": {}}
    if args.model:
        if args.data is None or not (args.data / "wiki.test.raw").is_file():
            raise OSError(f"--data {args.data}: no folder with wiki.valid.tokens and wiki.test.raw")
    check_device(args.device)
    measure_all(store, args)
    if lacking := {options("rtn", *SEEDED), *map(ablation, ABLATED_BITS)} - store["runs"].keys():
        raise OSError(f"{STORE}: too few runs for a page; make {min(lacking)} first (of SmolLM2: --model, --data)")
    write_page(store)


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
