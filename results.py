"""The measurements of RESULTS.md, and the page itself.

    python results.py --model smollm2 --data wikitext-2    # what has not been measured yet, then the page
    python results.py                                      # the page alone, from docs/results.json

smollm2 is a Hugging Face folder; wikitext-2 holds wiki.valid.tokens (calibration) and wiki.test.raw (evaluation). A
measurement is one call of calibrate.py with the options that the page shows. Each is kept as soon as it is there, so
this can be stopped and started again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from blocks import Training
from eval import check_device, default_device, guarded
from flexbcq import METHODS, FlexBCQLinear
from llama import write_json, whole_file

HERE = Path(__file__).parent
STORE, PAGE = HERE / "docs" / "results.json", HERE / "RESULTS.md"
SETTING = "--samples 24 --seq-len 512 --epochs 2 --eval-seq-len 2048 --eval-windows 20"
CELLS = [(bits, group_size) for bits in (3, 2, 4) for group_size in (64, -1)]
SEEDED = (3, 64)  # the cell with three seeds
ABLATED = (3, -1)


def options(method: str, bits: int, group_size: int, *more: str) -> str:
    return " ".join([f"--method {method} --bits {bits} --group-size {group_size}", *more])


def ablations() -> dict[str, list[str]]:
    """Question -> switches that answer it; "" is the default."""
    return {
        "initialization": ["--n-ratios 1", "--n-ratios 50", "--n-rounds 0", "--no-importance"],
        "gradient filtering": ["--tau 0.5", "--tau 2", "--tau 4", "--tau 1e9"],
        "mapping": ["--period 1", "--period 4", "--period 8", "--no-local"],
        "training": ["--mapping-rate 0.0025", "--mapping-rate 0.01", "--level-rate 0", "--level-rate 0.005"]
        + ["--no-learn-shift", "--original-input 0"],
        "calibration": ["--samples 12 --epochs 4", "--samples 48 --epochs 1", "--epochs 1", "--epochs 4"],
    }


def wanted() -> list[str]:
    """The options of every run, the most important first."""
    table = [options(method, *cell) for cell in CELLS for method in METHODS]
    seeds = [options(method, *SEEDED, f"--seed {s}") for s in (1, 2) for method in METHODS if method != "rtn"]
    return table + [options("flexbcq", *ABLATED, s) for group in ablations().values() for s in group] + seeds


# ---------------------------------------------------------------------------------------------------- measuring


def machine(device: str, threads: int) -> str:
    """The hardware, by name."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s'[: threads > 1]}"


def measure(chosen: str, args: argparse.Namespace) -> dict:
    """Calibrate in a process of its own, into a folder that is deleted. Raises OSError with what it printed last."""
    threads = max(1, os.cpu_count() // args.jobs)
    texts = ["--text", args.data / "wiki.valid.tokens", "--eval-text", args.data / "wiki.test.raw"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        baselines = "--baselines" if "rtn" in chosen and "--seed" not in chosen else "--no-baselines"
        command = ["calibrate.py", "--model", args.model, "--device", args.device, *texts, *SETTING.split()]
        call([*command, *chosen.split(), baselines, "--out", out], threads)
        report = json.loads((out / "calibration.json").read_text())
        blocks = report.pop("blocks")
        record = {key: report[key] for key in ("perplexity", "bits_per_weight", "seconds", "peak_bytes", "eval_windows")}
        record |= {key: sum(block[key] for block in blocks) for key in ("initializing", "training")}
        if "moves" in blocks[0]:
            record["moves"] = [statistics.mean(shares) for shares in zip(*(block["moves"] for block in blocks))]
    return record | {"machine": machine(args.device, threads), "versions": report["versions"]}


def call(command: list, threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def measure_all(store: dict, args: argparse.Namespace) -> None:
    """Fill the store with what it lacks, `args.jobs` runs side by side."""
    missing = [chosen for chosen in wanted() if chosen not in store][: args.runs]

    def one(chosen: str) -> None:
        store[chosen] = measure(chosen, args)
        write_json(STORE, store)
        bar.update()

    with tqdm(total=len(missing), unit="run") as bar, ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, missing))


# ---------------------------------------------------------------------------------------------------- the page


def lines(*rows: tuple) -> str:
    """A markdown table; the first row is its head, the first column is text."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ("---",) + ("---:",) * (len(rows[0]) - 1), *rows[1:]))


def values(store: dict, method: str, bits: int, group_size: int) -> list[float]:
    """Perplexities of a cell of the table, a value per seed."""
    runs = [options(method, bits, group_size), *(options(method, bits, group_size, f"--seed {s}") for s in (1, 2))]
    return [store[run]["perplexity"][method] for run in runs if run in store]


def shown(found: list[float], best: bool) -> str:
    if not found:
        return ""
    text = f"{statistics.mean(found):,.{1 if found[0] > 100 else 2}f}"
    text = f"**{text}**" if best else text
    return text + (f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else "")


def name_of(bits: int, group_size: int) -> str:
    return f"{bits} bits, " + ("a row" if group_size == -1 else f"groups of {group_size}")


def main_table(store: dict) -> str:
    rows = [("perplexity", "bits per weight", *METHODS)]
    for cell in sorted(CELLS, reverse=True):
        found = {method: values(store, method, *cell) for method in METHODS}
        measured = {method: statistics.mean(v) for method, v in found.items() if v}
        if measured:
            best = min(measured, key=measured.get)
            stored = store[options(best, *cell)]["bits_per_weight"]
            rows.append((name_of(*cell), f"{stored:.2f}", *(shown(found[m], m == best) for m in METHODS)))
    return lines(*rows)


def cost_table(store: dict) -> str:
    rows = [("seconds (peak memory)", *METHODS)]
    for cell in sorted(CELLS, reverse=True):
        runs = [store.get(options(method, *cell)) for method in METHODS]
        cost = [f"{run['seconds']:.0f} ({run['peak_bytes'] / 1e9:.1f} GB)" if run else "" for run in runs]
        rows.append((name_of(*cell), *cost))
    return lines(*rows)


def ablation_table(store: dict) -> str:
    default = values(store, "flexbcq", *ABLATED)
    if not default:
        return "Not measured yet."
    rows = [("", "switch", "perplexity", "against the default")]
    rows.append(("default", "", f"{default[0]:.2f}", ""))
    for question, switches in ablations().items():
        for switch in switches:
            if run := store.get(options("flexbcq", *ABLATED, switch)):
                value = run["perplexity"]["flexbcq"]
                rows.append((question, f"`{switch}`", f"{value:.2f}", f"{value / default[0] - 1:+.1%}"))
    return lines(*rows)


def parameter_table() -> str:
    """What is learned in a layer of SmolLM2's MLP, counted in the modules themselves."""
    import torch

    rows = [("", "per weight, a row", "per weight, groups of 64", "learning rate", "after the fold")]
    layers = [FlexBCQLinear(torch.randn(1536, 576), 3, size, n_ratios=1, n_rounds=1) for size in (-1, 64)]
    fate = {"alpha": "3 in fp16", "shift": "1 in fp16", "log_scale": "in alpha, shift", "log_s_row": "in alpha, shift"}
    for name, _ in layers[0].named_parameters():
        learned = [getattr(layer, name).numel() / layer.w.numel() for layer in layers]
        rate = "level_rate" if name in ("alpha", "shift") else "mapping_rate"
        rate = getattr(Training, rate)
        rows.append((name, *(f"{n:.4f}" for n in learned), f"{rate:g}", fate.get(name, "in the codes")))
    return lines(*rows)


def plots(store: dict) -> None:
    """Perplexity against period and tau, and how far codes moved."""
    default = values(store, "flexbcq", *ABLATED)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (switch, start) in zip(panels, (("period", Training.period), ("tau", Training.tau))):
        found = {start: default[0]}
        for chosen, run in store.items():
            if chosen.startswith(options("flexbcq", *ABLATED, f"--{switch} ")):
                found[float(chosen.split()[-1])] = run["perplexity"]["flexbcq"]
        points = sorted((min(x, 16), y) for x, y in found.items())
        axes.plot(*zip(*points), "o-", color="#0072B2")
        axes.plot(start, default[0], "o", color="#D55E00", label="default")
        axes.set_xscale("log", base=2)
        axes.set_xticks([x for x, _ in points], ["none" if x == 16 else f"{x:g}" for x, _ in points])
        axes.set(xlabel={"period": "period p, steps", "tau": "filtering beyond tau * min |alpha|"}[switch])
        axes.set(ylabel="perplexity", title=f"flexbcq, {name_of(*ABLATED)}")
        axes.legend()
    for bits, color in zip((2, 3, 4), ("#0072B2", "#D55E00", "#009E73")):
        if run := store.get(options("flexbcq", bits, -1)):
            shares = [(d, s) for d, s in enumerate(run["moves"]) if s]
            panels[2].semilogy(*zip(*shares), "o-", color=color, label=f"{bits} bits, a row")
    panels[2].set(xlabel="levels a weight moved in training", ylabel="share of the weights", title="moves of the codes")
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    panels[2].legend()
    with whole_file(HERE / "docs" / "ablation.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def page(store: dict) -> str:
    runs = list(store.values())
    machines = sorted({run["machine"] for run in runs})
    original = next(run["perplexity"]["original"] for run in runs if "original" in run["perplexity"])
    missing = len([chosen for chosen in wanted() if chosen not in store])
    first = runs[0]
    return f"""# Results

Written by `results.py`; every number below is from a run of `calibrate.py` with the options named here, kept in
`docs/results.json`. {f"{missing} of {len(wanted())} runs are still to be made." if missing else "All runs were made."}

SmolLM2-135M-Instruct (30 blocks, 106 million weights quantized; as a 4-bit GGUF file holds it, widened to bf16), WikiText-2.
Perplexity on the first {first["eval_windows"]} windows of 2,048 tokens of the test set, for which the original has
**{original:.2f}**. Calibration on the validation set, the same samples and steps for every method:

    python calibrate.py --model smollm2 --text wiki.valid.tokens --eval-text wiki.test.raw \\
        {SETTING} --method METHOD --bits BITS --group-size SIZE

That is {2 * 24} steps of one sequence of 512 tokens a block, 2 % of the paper's 2,560 on sequences a quarter as long: a
comparison at equal cost, not the end of the road. Seed 0; where a range is given, the mean of seeds 0, 1, 2.
Measured on {"; ".join(machines)}; torch {first["versions"]["torch"]}.

## The four methods

{main_table(store)}

What a run costs, checks and evaluation included:

{cost_table(store)}

## What each part of FlexBCQ contributes

flexbcq, {name_of(*ABLATED)}, one thing changed at a time; the switches are options of `calibrate.py`.

{ablation_table(store)}

![Perplexity against the period and the threshold of filtering; how far codes moved](docs/ablation.png)

## What is learned

A layer of 1,536 x 576 at 3 bits. Nothing but bit-planes, alpha and shift remains: k + 16 (k + 1) / group_size bits per weight.

{parameter_table()}
"""


def run(args: argparse.Namespace) -> None:
    store = json.loads(STORE.read_text("utf-8")) if STORE.exists() else {}
    if args.model:
        if args.data is None or not (args.data / "wiki.test.raw").is_file():
            raise OSError(f"--data {args.data}: no folder with wiki.valid.tokens and wiki.test.raw")
        check_device(args.device)
        measure_all(store, args)
    plots(store)
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(store), "utf-8")
    print(f"wrote {PAGE.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what RESULTS.md shows, as far as it is missing; write it.")
    add = parser.add_argument
    add("--model", type=Path, help="the original SmolLM2-135M, a Hugging Face folder (default: measure nothing)")
    add("--data", type=Path, help="folder with wiki.valid.tokens and wiki.test.raw")
    add("--jobs", type=int, default=1, help="runs side by side, sharing the cores (default: %(default)s)")
    add("--runs", type=int, help="make only so many (default: all that are missing)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
