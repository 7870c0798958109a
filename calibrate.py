"""Quantize a Llama block by block and write it as a packed checkpoint folder.

    python calibrate.py                                                      # the bundled model, 3 bits
    python calibrate.py --model FOLDER --text wiki.train.raw --eval-text wiki.test.raw --bits 3 --group-size 128
    torchrun --nproc-per-node 8 calibrate.py --model FOLDER ..               # with all GPUs of a machine

What is done to each block stands in blocks.py; how a run that was killed goes on, in resume.py; how several processes
share the work, in parallel.py. Here: the checks and the plan beforehand, the loop over the blocks, the report.
"""

import argparse
import math
import os
import platform
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import parallel
from blocks import Training, activations, forward, is_trained, pack_layers, quantize_block, quantize_layers
from command import check_device, default_device, guarded
from eval import TINY, batches, cut, load_text, load_tokenizer, perplexity, resolve_seq_len, tokenize
from flexbcq import METHODS, peak_bytes
from kernel import BCQLinear
from llama import Block, Checkpoint, linears, rope_tables, side_files, whole_file, write_json
from resume import REPORT, dequantize_blocks, read_block, resumable, write_block, write_rest

QUICK_EPOCHS = 1  # for the bundled model: less than three minutes on two CPU cores
SWITCHES = [f for f in fields(Training) if f.metadata]


def calibrate(checkpoint: Checkpoint, ids: Tensor, args, settings: Training, folder: Path, report: dict) -> None:
    """Quantize every block, in order, and write it to `folder`; those in the report are finished already.

    ids: (samples, seq_len); report: as in resume.py, here it gets a record per block"""
    n_blocks, records = checkpoint.config.num_hidden_layers, report["blocks"]
    if len(records) == n_blocks:
        return
    rope = rope_tables(checkpoint.config, ids.shape[1], args.device)
    original, quantized, target = first_inputs(checkpoint, parallel.share(ids), args.offload)
    for i in tqdm(range(len(records)), desc="finished blocks again, forward only", leave=False, disable=not records):
        block = checkpoint.block(i, device=args.device)
        forward(block, original, rope, out=original)
        for name, layer in read_block(checkpoint, i, folder, args).items():
            block.set_submodule(name, layer.to(args.device))
        forward(block, quantized, rope, out=quantized)
    n_steps = settings.epochs * len(ids) // settings.batch_size if is_trained(args.method) else 0
    for i in range(len(records), n_blocks):
        with tqdm(total=7 + n_steps, desc=f"block {i + 1}/{n_blocks}", unit="step") as bar:  # 7 linears to initialize
            inputs = original, quantized
            packed, record = quantize_block(checkpoint, i, inputs, target, rope, args, settings, bar)
            original, target = target, original
            records.append(record)
            if parallel.rank() == 0:
                write_block(checkpoint, i, packed, folder)
                write_json(folder / REPORT, report)
            left = sum(r["seconds"] for r in records) / len(records) * (n_blocks - i - 1) / 60
            bar.set_postfix_str(
                "loss {loss_before:.3e} -> {loss_after:.3e}".format(**record) + f", {left:.1f} min left"
            )


def first_inputs(checkpoint: Checkpoint, ids: Tensor, folder: str | None) -> list[Tensor]:
    """Three sets of activations (see blocks.py), two of them filled with the embeddings of ids: (samples, seq_len)."""
    sets = [activations((*ids.shape, checkpoint.config.hidden_size), folder) for _ in range(3)]
    table = checkpoint.embedding(torch.bfloat16)
    for part, *places in zip(*(batches(x) for x in (checkpoint.check_ids(ids), *sets[:2]))):
        for place in places:
            place.copy_(table(part))
    return sets


def check_layers(checkpoint: Checkpoint, n_bits: int, group_size: int) -> tuple[int, float]:
    """Weights to quantize in a block, and stored bits for each, alpha and shift counted.

    Raises ValueError naming a layer that does not fit."""
    with torch.device("meta"):
        block = Block(checkpoint.config)
    stored = weights = 0
    for name, linear in linears(block).items():
        try:
            packed = BCQLinear(linear.in_features, linear.out_features, n_bits, group_size)
        except ValueError as error:
            raise ValueError(f"model.layers.0.{name}: {error}") from None
        stored += sum(8 * t.numel() * t.element_size() for t in packed.state_dict().values())
        weights += linear.weight.numel()
    return weights, stored / weights


def load_texts(checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[Tensor, Tensor, str]:
    """Calibration samples (samples, seq_len), evaluation windows (n_windows, eval_seq_len) and the name of their text.

    Samples start at random places. Without --eval-text the last tenth of --text is kept for evaluation; of the
    standard library it is every sixth window of the held-out files."""
    tokenizer, every = load_tokenizer(checkpoint.folder), 1
    text, name = load_text(args.text, held_out=False)
    if args.text and not args.eval_text:
        split = len(text) * 9 // 10
        text, eval_text, eval_name = text[:split], text[split:], f"last tenth of {name}"
    else:
        eval_text, eval_name = load_text(args.eval_text, held_out=True)
        every = 1 if args.eval_text else 6
    ids = tokenize(tokenizer, text, name, args.seq_len)
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(len(ids) - args.seq_len + 1, (args.samples,), generator=generator).tolist()
    samples = torch.stack([ids[start : start + args.seq_len] for start in starts])
    windows = cut(tokenize(tokenizer, eval_text, eval_name, args.eval_seq_len), args.eval_seq_len)[::every]
    return samples, windows[: args.eval_windows], eval_name


def plot(records: list[dict], title: str, path: Path) -> None:
    """Loss of each block before and after training."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    blocks = range(1, len(records) + 1)
    axes.semilogy(blocks, [r["loss_before"] for r in records], "o--", color="#D55E00", label="before training")
    axes.semilogy(blocks, [r["loss_after"] for r in records], "s-", color="#0072B2", label="as written")
    axes.set(xlabel="block", ylabel="mean squared error of the block's output", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def stored_bits(checkpoint: Checkpoint, weights: int) -> float:
    """Of a weight of the blocks' linear layers in the files, alpha and shift counted. weights: how many in a block."""
    return 8 * checkpoint.n_bytes(lambda name: "_proj." in name) / (checkpoint.config.num_hidden_layers * weights)


def print_table(perplexities: dict[str, float], n_bits: int, weights: int, source: Checkpoint, written: Checkpoint):
    """A line per model: perplexity, stored bits per quantized weight, size of the weight files."""
    print(f"\n{'':20}{'perplexity':>12}{'bits per weight':>18}{'files':>12}")
    for name, value in perplexities.items():
        label, of = (name, source) if name == "original" else (f"{name}, {n_bits} bits", written)
        print(f"{label:20}{value:12.3f}{stored_bits(of, weights):18.3f}{of.file_size() / 1e6:9.1f} MB")


def prepare(args: argparse.Namespace) -> tuple[Checkpoint, Training]:
    """Check the options and fill in the defaults that depend on the model. Raises ValueError or OSError."""
    args.device = check_device(parallel.start(args.device))
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    checkpoint = Checkpoint(args.model)
    if checkpoint.config.quantization:
        raise ValueError(f"{args.model}: is quantized already; give the original model")
    args.out = Path(args.out or f"{checkpoint.folder.resolve().name}-{args.method}-{args.bits}bit")
    if args.out.name in ("", ".."):
        raise OSError(f"--out {args.out}: give the name of a new folder")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise OSError(f"--out {args.out}: exists and is not empty; delete it or choose another folder")
    if args.out.is_symlink() or args.out.is_mount():
        raise OSError(f"--out {args.out}: is a link or a mount point; give the name of a new folder inside it")
    for file in side_files(checkpoint.folder):
        file.open("rb").close()  # to be copied at the end
    if not os.access(args.out.parent, os.W_OK | os.X_OK):
        raise OSError(f"--out {args.out}: {args.out.parent} is no folder that can be written to; create it first")
    args.seq_len = resolve_seq_len(args.seq_len, checkpoint)
    if args.eval_seq_len is None:
        args.eval_seq_len = args.seq_len
    resolve_seq_len(args.eval_seq_len, checkpoint, "--eval-seq-len")
    if args.epochs is None:
        args.epochs = QUICK_EPOCHS if checkpoint.folder.resolve() == TINY else Training.epochs
    if args.batch_size is None:
        args.batch_size = parallel.world() * Training.batch_size
    ranges = dict.fromkeys(("samples", "epochs", "batch_size", "eval_windows"), (1, math.inf))
    ranges |= {"seed": (0, 2**32 - 1)} | {switch.name: switch.metadata["range"] for switch in SWITCHES}
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            wanted = f"choose {low} to {high}" if high < math.inf else f"must be at least {low}"
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: {wanted}")
    if args.samples % args.batch_size or args.batch_size % parallel.world():
        raise ValueError(
            f"--batch-size {args.batch_size}: must divide --samples {args.samples}, and the number of processes "
            f"({parallel.world()}) must divide it"
        )
    if args.offload and not os.access(args.offload, os.W_OK | os.X_OK):
        raise OSError(f"--offload {args.offload}: no folder that can be written to; create it first")
    return checkpoint, Training(**{field.name: getattr(args, field.name) for field in fields(Training)})


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes of it: the peak of this process so far, and what there is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    return peak_bytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_space(checkpoint: Checkpoint, weights: int, bits: float, args: argparse.Namespace) -> None:
    """Print what will be needed on the host. Raises ValueError if there is less of it."""
    config, partial = checkpoint.config, args.out.with_name(args.out.name + ".partial")
    stored = checkpoint.file_size()
    if not args.dequantized:
        linear = checkpoint.n_bytes(lambda name: name.endswith("_proj.weight"))
        stored += config.num_hidden_layers * weights * bits / 8 - linear
    there = sum(file.stat().st_size for file in partial.glob("*"))  # of an earlier run, to be gone on with
    needs = {f"--out {args.out}": (stored - there, shutil.disk_usage(args.out.parent).free)}
    activations = 3 * 2 * args.samples * args.seq_len * config.hidden_size
    if args.offload:
        needs[f"--offload {args.offload}"] = activations, shutil.disk_usage(args.offload).free
    else:
        needs[f"--samples {args.samples}, activations in memory"] = activations, memory(torch.device("cpu"))[1]
    for name, (needed, free) in needs.items():
        print(f"{name}: {needed / 1e9:.3f} GB of {free / 1e9:.1f} GB")
        if needed > free:
            raise ValueError(
                f"{name}: needs {needed / 1e9:.3f} GB, there are {free / 1e9:.3f}; make space or ask for less"
            )


def rehearse(checkpoint: Checkpoint, samples: Tensor, windows: Tensor, args, settings: Training) -> None:
    """Everything once and small: the original on a few windows, and block 0 with four steps. Prints a plan of the run.

    What would fail after a day fails here: a wrong tokenizer, a block that does not fit into the memory of the GPU."""
    config, few = checkpoint.config, windows[:4]
    print(f"perplexity of the original on {len(few)} windows: {perplexity(checkpoint, few, args.device):.3f}", end="")
    print(f" (guessing among {config.vocab_size} tokens: {config.vocab_size})")
    few = samples[: 4 * settings.batch_size]
    rope = rope_tables(config, args.seq_len, args.device)
    *inputs, target = first_inputs(checkpoint, parallel.share(few), None)
    short, stamps = replace(settings, epochs=1), []
    with tqdm(disable=True) as bar:
        bar.update = lambda: stamps.append(time.time())
        record = quantize_block(checkpoint, 0, inputs, target, rope, args, short, bar)[1]
    steps = is_trained(args.method) * args.samples * args.epochs // args.batch_size
    per_sample = (record["seconds"] - record["initializing"] - record["training"]) / len(few)
    per_step = (stamps[-1] - stamps[-3]) / 2 if steps else 0  # of the last two, with a new mapping and without
    seconds = record["initializing"] + per_sample * args.samples + per_step * steps
    peak, total = memory(args.device)
    print(f"{args.device}: {peak / 1e9:.1f} GB of {total / 1e9:.1f} GB at the peak")
    minutes = config.num_hidden_layers * seconds / 60
    print(f"{config.num_hidden_layers} blocks of {steps} steps, {per_step:.3f} seconds each: ", end="")
    print(f"about {minutes:.0f} minutes, and the perplexities")


def run(args: argparse.Namespace) -> None:
    start, (checkpoint, settings) = time.time(), prepare(args)
    weights, bits = check_layers(checkpoint, args.bits, args.group_size)
    check_space(checkpoint, weights, bits, args)
    samples, windows, eval_name = load_texts(checkpoint, args)
    rehearse(checkpoint, samples, windows, args, settings)
    if args.dry_run:
        return

    def round_to_nearest(block: Block, i: int) -> None:
        pack_layers(block, dict(quantize_layers(checkpoint, block, i, "rtn", args.bits, args.group_size)))

    chosen = {key: getattr(args, key) for key in ("method", "bits", "group_size", "dequantized", "samples", "seq_len")}
    chosen |= asdict(settings)
    texts = {"calibration text": samples, "evaluation text": windows}
    with resumable(args.out, chosen, checkpoint, texts) as (folder, report):
        start -= sum(record["seconds"] for record in report["blocks"])  # of earlier runs
        found = report["perplexity"]
        if parallel.rank() == 0 and args.baselines and "original" not in found:
            found["original"] = perplexity(checkpoint, windows, args.device, label="original")
        if parallel.rank() == 0 and args.baselines and "rtn" not in found and args.method != "rtn":
            found["rtn"] = perplexity(checkpoint, windows, args.device, round_to_nearest, "rtn")
        calibrate(checkpoint, samples, args, settings, folder, report)
        if parallel.rank() == 0:
            if args.dequantized:
                dequantize_blocks(checkpoint, folder, args)
            versions = {"torch": torch.__version__, "python": platform.python_version()}
            packed = {"quant_method": "flexbcq"} | chosen | versions
            write_rest(checkpoint, folder, None if args.dequantized else packed)
            written = Checkpoint(folder)
            found[args.method] = perplexity(written, windows, args.device, label=args.method)
            report |= {"text": eval_name, "eval_seq_len": args.eval_seq_len, "eval_windows": len(windows)}
            report |= {"bits_per_weight": stored_bits(written, weights), "peak_bytes": peak_bytes()}
            report |= {"seconds": time.time() - start, "versions": versions}
            report |= {"cpu_seconds": time.process_time()}  # without those of killed processes
            write_json(folder / REPORT, report)
            with whole_file(folder / "calibration.png") as temporary:
                plot(report["blocks"], f"{args.method}, {args.bits} bits", temporary)
    if parallel.rank() == 0:
        print_table(found, args.bits, weights, checkpoint, Checkpoint(args.out))
        print(
            f"{eval_name}, seq_len {args.eval_seq_len}, {len(windows)} windows; {report['seconds']:.0f} seconds; "
            f"wrote {args.out}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Quantize a Llama (a Hugging Face folder) and write it as a packed checkpoint folder.",
        epilog="The defaults of training are the paper's, with a trained shift and a wider initialization; for the "
        "bundled model, one epoch instead of 20.",
    )
    add = parser.add_argument
    add("--model", default=TINY, help="checkpoint folder (default: the bundled models/tiny)")
    add("--out", help="new folder to write (default: MODEL-METHOD-BITSbit in the current one)")
    add("--method", choices=METHODS, default="flexbcq", help="(default: %(default)s)")
    add("--bits", type=int, default=3, help="bit-planes per weight, 1 to 8 (default: %(default)s)")
    add("--group-size", type=int, default=-1, help="weights sharing alpha and shift, a multiple of 32; -1: the row "
        "(default: %(default)s)")  # fmt: skip
    add("--text", help="UTF-8 file to calibrate on (default: the Python standard library)")
    add("--eval-text", help="UTF-8 file for perplexity (default: the last tenth of --text, else files held out of "
        "the library)")  # fmt: skip
    add("--eval-seq-len", type=int, help="tokens per window of it (default: as --seq-len)")
    add("--eval-windows", type=int, default=2**30, help="measure only on so many, from the start (default: all)")
    add("--baselines", action=argparse.BooleanOptionalAction, default=True, help="measure the original and rtn too "
        "(default: %(default)s)")  # fmt: skip
    add("--samples", type=int, default=128, help="calibration sequences (default: %(default)s)")
    add("--seq-len", type=int, help="tokens in each (default: 2048, or the model's context if smaller)")
    add("--epochs", type=int, help=f"passes over the samples (default: {Training.epochs}; bundled: {QUICK_EPOCHS})")
    add("--batch-size", type=int, help="sequences in a step (default: 1, with torchrun one per process)")
    add("--seed", type=int, default=0, help="of samples, their order and mixing (default: %(default)s)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--dequantized", action="store_true", help="write ordinary weights, rounded to what the planes hold, "
        "for other software")  # fmt: skip
    add("--offload", help="keep activations in this folder, on a disk, instead of memory")
    add("--dry-run", action="store_true", help="check everything, print what it takes, and stop")
    group = parser.add_argument_group("switches, for ablations")
    for switch in SWITCHES:
        kind = {"action": argparse.BooleanOptionalAction} if switch.type is bool else {"type": switch.type}
        text = f"{switch.metadata['help']} (default: {switch.default})"
        group.add_argument(f"--{switch.name.replace('_', '-')}", default=switch.default, help=text, **kind)
    guarded(run, parser)


if __name__ == "__main__":
    main()
