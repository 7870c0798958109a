"""Quantize a Llama block by block and write it as a packed checkpoint folder.

    python calibrate.py                                                      # the bundled model, 3 bits
    python calibrate.py --model FOLDER --text wikitext2 --bits 3 --group-size 128
    torchrun --nproc-per-node 8 calibrate.py --model FOLDER ..               # with all GPUs of a machine

For each decoder block: initialize its quantizers; train them so that the block, fed with the output of the quantized
blocks before it, returns what the original model returns there; pack it. (Block by block as in BRECQ, Li et al. 2021;
half of the inputs from the original model as in QDrop, Wei et al. 2022.) At the end all levels of the model are
trained together, see support/finish.py.

In memory are one block with its quantizers and, on the host, three sets of activations, (samples, seq_len,
hidden_size) in bf16; for error feedback, the block's Hessians too. Arithmetic is in float32 (products
of training steps on a GPU: TF32). How a killed run is resumed is explained in support/resume.py, how several processes
share the work in support/parallel.py.
"""

if __name__ == "__main__":
    import support.interrupt  # noqa: F401 (from here on Ctrl-C is one line)

import argparse
import math
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eval import perplexity
from flexbcq import WITH_GPTQ, FlexBCQLinear
from kernel import BCQLinear, paths
from llama import Block, linears, rope_tables
from support import parallel
from support.checkpoint import Checkpoint, whole_file, write_json
from support.command import coarse_products, guarded, named
from support.data import batches, empty_activations, load_texts
from support.finish import finish, leave_out
from support.plan import (
    check_layers,
    check_perplexity,
    check_space,
    check_weights,
    finish_fits,
    peak_and_total,
    peak_bytes,
    plot,
    print_table,
    resolve,
    stored_bits,
)
from support.resume import REPORT, dequantize_blocks, read_block, resumable, write_block, write_rest
from support.settings import PAPER, Settings, add_options, flag

CHECK_EVERY = 50  # training steps: to look at a loss, the host must wait for a GPU
N_LINEARS = 7  # in a block: q, k, v, o, gate, up, down
SAME_INPUT = {  # layer -> another with the same input
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}

# -------------------------------------------------------------------------------------------------------- activations


@dataclass
class Activations:
    """What a block is calibrated on: (samples, seq_len, hidden_size) each, in bf16, on the host."""

    original: Tensor  # output of the original blocks before it
    quantized: Tensor  # output of the quantized blocks before it
    target: Tensor  # output of the original block on `original`; not filled until it has run
    rope: tuple[Tensor, Tensor]  # cos and sin, on the device that computes

    def next_block(self) -> None:
        """The block's target becomes the next block's original input, and its output, which `settle` has written to
        `original`, becomes the quantized one."""
        self.original, self.quantized, self.target = self.target, self.original, self.quantized


def first_activations(checkpoint: Checkpoint, ids: Tensor, settings: Settings) -> Activations:
    """Those of block 0: both inputs are the embeddings of ids, (samples, seq_len)."""
    shape = (*ids.shape, checkpoint.config.hidden_size)
    original, quantized, target = (empty_activations(shape, settings.offload) for _ in range(3))

    table = checkpoint.embedding(torch.bfloat16)
    for part, a, b in zip(batches(checkpoint.check_ids(ids)), batches(original), batches(quantized)):
        a.copy_(table(part))
        b.copy_(a)
    return Activations(original, quantized, target, rope_tables(checkpoint.config, ids.shape[1], settings.device))


@torch.inference_mode()
def run_block(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Write the block's output on x to out, which may be x; both (samples, seq_len, hidden_size) on the host."""
    for part, place in zip(batches(x), batches(out)):
        place.copy_(block(part.to(rope[0].device).float(), *rope).bfloat16())  # half the bytes to and from a GPU


@torch.inference_mode()
def output_error(
    block: Block, x: Tensor, rope: tuple[Tensor, Tensor], target: Tensor, out: Tensor | None = None
) -> float:
    """Mean squared error of the block's output on x, averaged over the samples of all processes.

    out: where the output goes, which may be x; None: nowhere"""
    error = 0.0
    for part, wanted, place in zip(batches(x), batches(target), batches(x if out is None else out)):
        y = block(part.to(rope[0].device).float(), *rope)
        error += F.mse_loss(y, wanted.to(y.device).float(), reduction="sum").item()
        if out is not None:
            place.copy_(y.bfloat16())
    return parallel.mean(error / x.numel())


# -------------------------------------------------------------------------------------------------------- one block


@contextmanager
def watching(layers: dict[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While this is open, see(name, x) gets every input x, (samples, seq_len, in_features), of each layer."""
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        for name, linear in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def input_squares(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """For each layer, (in_features,): the sum of squares of each input over all tokens that pass while this is open,
    averaged over the processes at the end."""
    squares = {name: linear.weight.new_zeros(linear.in_features).double() for name, linear in layers.items()}

    def add(name: str, x: Tensor) -> None:
        squares[name] += x.square().sum((0, 1), dtype=torch.float64)

    with watching(layers, add):
        yield squares
    parallel.average(squares.values())


@torch.inference_mode()
def input_hessians(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """For each layer, (in_features, in_features): the sum of x x^T over all its inputs x, averaged over the processes.

    x: what the block is fed with, (samples, seq_len, hidden_size) on the host
    In memory: four matrices in float32 (Llama-2-7B: 0.7 GB), as layers with the same input share one; error feedback
    allocates about five more, the size of one layer's."""
    layers = {name: linear for name, linear in linears(block).items() if name not in SAME_INPUT}
    hessians = {name: linear.weight.new_zeros(2 * [linear.in_features]) for name, linear in layers.items()}

    def add(name: str, inputs: Tensor) -> None:
        tokens = inputs.flatten(0, 1)
        hessians[name].addmm_(tokens.T, tokens)

    with watching(layers, add):
        for part in batches(x):
            block(part.to(rope[0].device).float(), *rope)
    parallel.average(hessians.values())
    return hessians | {name: hessians[other] for name, other in SAME_INPUT.items()}


def quantize_layers(
    checkpoint: Checkpoint,
    block: Block,
    i: int,
    settings: Settings,
    importance: dict[str, Tensor] | None = None,
    hessians: dict[str, Tensor] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, FlexBCQLinear]:
    """Swap every linear layer of block i for a quantizer of the weight. Returns the quantizers by name.

    importance: what `FlexBCQLinear` takes, by name; None: all columns count alike
    hessians: the same; None: without error feedback
    advance: called after each layer"""
    layers = linears(block)
    quantizers = dict.fromkeys(layers)

    # those that need most memory first, while there are few quantizers: by weights, then by size of the Hessian
    for name in sorted(layers, key=lambda name: (-layers[name].weight.numel(), -layers[name].in_features)):
        # the weight as it is stored: the block holds a copy in float32, twice the memory
        linear = layers.pop(name)
        weight = checkpoint.tensor(f"model.layers.{i}.{name}.weight").to(linear.weight.device)

        # the quantizer, with the switches of the method
        with named(name):
            quantizer = FlexBCQLinear(
                weight,
                settings.bits,
                settings.group_size,
                *WITH_GPTQ[settings.method],
                n_ratios=settings.n_ratios,
                n_rounds=settings.n_rounds,
                importance=importance[name] if importance else None,
                tau=settings.tau,
                bias=linear.bias,
                hessian=hessians[name] if hessians else None,
                n_passes=settings.feedback_passes,
            )
        if not settings.learn_shift:
            quantizer.shift.requires_grad_(False)

        # it takes the place of the layer
        block.set_submodule(name, quantizer)
        quantizers[name] = quantizer
        advance()
    return quantizers


def pack_layers(quantizers: dict[str, FlexBCQLinear]) -> dict[str, BCQLinear]:
    """The bit-planes of every quantizer, by name."""
    packed = {}
    for name, quantizer in quantizers.items():
        with named(name):
            packed[name] = quantizer.pack()
    return packed


def settle(block: Block, packed: dict[str, BCQLinear], x: Activations) -> float:
    """Replace the layers by their bit-planes (on several processes: those of the first). From here on the block
    computes with the numbers in the file. Overwrites the original inputs, no longer needed, with the output, and
    returns its error."""
    for name, layer in packed.items():
        parallel.agree(layer.state_dict().values())
        block.set_submodule(name, layer)
    return output_error(block, x.quantized, x.rope, x.target, out=x.original)


def train_block(
    block: Block,
    quantizers: list[FlexBCQLinear],
    x: Activations,
    settings: Settings,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Adam on the mean squared error of the block's output; changes the quantizers in place.

    seed: of the order of the samples and the mixing of inputs; advance: called after each step
    Raises ValueError if the loss is not finite."""
    mapping = [p for q in quantizers for p in q.mapping_parameters()]
    levels = [p for q in quantizers for p in q.level_parameters()]
    rates = [{"params": mapping, "lr": settings.mapping_rate}, {"params": levels, "lr": settings.level_rate}]
    optimizer = torch.optim.Adam(rates, fused=True)
    device = x.rope[0].device
    draws = parallel.Draws(len(x.target), settings.batch_size, settings.epochs, seed, device)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(draws))
    losses = torch.zeros(len(draws), device=device)

    for step, (chosen, uniform) in enumerate(draws):
        # every few steps (2 by default), choose the codes again
        if step and step % settings.period == 0:
            for quantizer in quantizers:
                quantizer.remap(settings.local)

        # a share of the input elements (half by default) comes from the original model
        rows = (sent(t[chosen], device) for t in (x.original, x.quantized, x.target))
        original, quantized, target = rows  # (samples in the step, seq_len, hidden_size)
        from_original = uniform(original.shape[1:]) < settings.original_input
        mixed = torch.where(from_original, original, quantized)

        # the quantized block should return what the original one returns
        with coarse_products(device):
            loss = F.mse_loss(block(mixed.float(), *x.rope), target.float())
            loss.backward()
        parallel.average(p.grad for p in mapping + levels)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance()

        losses[step] = loss.detach()
        if step % CHECK_EVERY == 0 or step + 1 == len(draws):
            check_finite(losses[: step + 1])


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """The rows on the device. From pinned memory a GPU copies them while it computes."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def check_finite(losses: Tensor) -> None:
    """Raises ValueError naming the first step whose loss is not finite."""
    wrong = losses.isfinite().logical_not().nonzero()
    if len(wrong):
        step = wrong[0].item()
        raise ValueError(f"the loss is {losses[step].item()} at step {step}")


@torch.inference_mode()
def moves(before: list[Tensor], after: list[Tensor], n_bits: int) -> list[float]:
    """Share of the weights whose level moved by 0, 1, 2, .. places. before, after: the `ranks` of each layer.

    >>> moves([torch.tensor([0, 1, 2, 3])], [torch.tensor([0, 0, 3, 3])], n_bits=2)
    [0.5, 0.5, 0.0, 0.0]"""
    counts = torch.zeros(2**n_bits, dtype=torch.int64)
    for old, new in zip(before, after):
        moved = torch.maximum(old, new) - torch.minimum(old, new)  # uint8 has no sign
        counts += torch.tensor([int((moved == distance).sum()) for distance in range(2**n_bits)])
    return (counts / counts.sum()).tolist()


def quantize_block(
    checkpoint: Checkpoint,
    i: int,
    x: Activations,
    settings: Settings,
    advance: Callable[..., None] = lambda news="": None,
) -> tuple[dict[str, BCQLinear], dict]:
    """Block i from float to bit-planes. Returns its packed layers and its record: seconds and losses.

    x: the activations of block i, which become those of block i + 1
    advance: called after each layer is initialized and after each step; once with the loss before training, as text
    A block that training has not improved is packed untrained; its record then has `training_kept` False.
    Raises ValueError if the loss is not finite or a layer cannot be packed."""
    start = time.perf_counter()
    block = checkpoint.block(i, device=settings.device)

    # what the original block returns, and what its layers receive
    with input_squares(linears(block) if settings.importance else {}) as importance:
        run_block(block, x.original, x.rope, out=x.target)
    hessians = input_hessians(block, x.quantized, x.rope) if settings.feedback_passes else None

    # levels and codes to start with
    initializing = time.perf_counter()
    quantizers = quantize_layers(checkpoint, block, i, settings, importance, hessians, advance)
    del hessians  # large, and training needs the memory
    for quantizer in quantizers.values():
        parallel.agree(quantizer.state_dict().values())  # GPUs do not add in the same order twice
    record = {"initializing": time.perf_counter() - initializing, "training": 0.0}
    record["loss_before"] = output_error(block, x.quantized, x.rope, x.target)
    if not math.isfinite(record["loss_before"]):
        raise ValueError(f"the loss before training is {record['loss_before']}")
    advance(f"loss {record['loss_before']:.3e}")

    # training
    if settings.is_trained:
        untrained = pack_layers(quantizers)
        ranks_before = [q.ranks() for q in quantizers.values()]
        training = time.perf_counter()
        train_block(block, list(quantizers.values()), x, settings, settings.seed * 100_003 + i, advance)
        record["training"] = time.perf_counter() - training
        record["moves"] = moves(ranks_before, [q.ranks() for q in quantizers.values()], settings.bits)

    # bit-planes; if training has not improved the block, those from before it
    packed = pack_layers(quantizers)
    record["loss_after"] = settle(block, packed, x)
    if settings.is_trained:
        record["training_kept"] = record["loss_after"] < record["loss_before"]
        if not record["training_kept"]:
            packed = untrained
            record["loss_after"] = settle(block, packed, x)

    # on to the next block
    x.next_block()
    record["seconds"] = time.perf_counter() - start
    return packed, record


# ------------------------------------------------------------------------------------------------------- all blocks


def calibrate(checkpoint: Checkpoint, ids: Tensor, settings: Settings, folder: Path, report: dict) -> None:
    """Quantize every block, in order, and write it to `folder`; those in the report are finished already.

    ids: (samples, seq_len); report: as in support/resume.py; gets one record per block here"""
    n_blocks, records = checkpoint.config.num_hidden_layers, report["blocks"]
    if len(records) == n_blocks:
        return

    # replay the blocks of an interrupted run
    x = first_activations(checkpoint, parallel.share(ids), settings)
    for i in tqdm(range(len(records)), desc="replaying finished blocks", leave=False, disable=not records):
        block = checkpoint.block(i, device=settings.device)
        run_block(block, x.original, x.rope, out=x.original)
        for name, layer in read_block(checkpoint, i, folder, settings).items():
            block.set_submodule(name, layer.to(settings.device))
        run_block(block, x.quantized, x.rope, out=x.quantized)

    for i in range(len(records), n_blocks):
        with tqdm(total=N_LINEARS + settings.n_steps, desc=f"block {i + 1}/{n_blocks}", unit="step") as bar:
            with named(f"model.layers.{i}"):
                packed, record = quantize_block(checkpoint, i, x, settings, partial(show, bar))
            records.append(record)
            if parallel.rank() == 0:
                write_block(checkpoint, i, packed, folder)
                write_json(folder / REPORT, report)

            minutes_left = sum(r["seconds"] for r in records) / len(records) * (n_blocks - i - 1) / 60
            losses = f"loss {record['loss_before']:.3e} -> {record['loss_after']:.3e}"
            losses += " (kept from before training, which did not lower it)" * (not record.get("training_kept", True))
            bar.set_postfix_str(f"{losses}, {minutes_left:.1f} min left")


def show(bar: tqdm, news: str = "") -> None:
    """Advance a progress bar by one step or, given some text, show it after the bar."""
    if news:
        bar.set_postfix_str(news)
    else:
        bar.update()


def rehearse(checkpoint: Checkpoint, samples: Tensor, windows: Tensor, settings: Settings) -> None:
    """Evaluate the original on a few windows, quantize block 0 with four steps; no finish. Prints a plan of the run.

    A wrong tokenizer, or a block that does not fit into the memory of the GPU, thus fails here and not hours later."""
    paths(settings.device.type)  # compiles the kernels now, so that this is not part of the measured time
    n_blocks, vocab_size = checkpoint.config.num_hidden_layers, checkpoint.config.vocab_size
    few = windows[:4]
    value = perplexity(checkpoint, few, settings.device)
    print(f"perplexity of the original on {len(few)} windows: {value:.3f}", end="")
    print(f" (guessing among {vocab_size} tokens: {vocab_size})")

    # block 0, with the time of every step
    few = samples[: 4 * settings.batch_size]
    short = replace(settings, samples=len(few), epochs=1, offload=None)
    x = first_activations(checkpoint, parallel.share(few), short)
    stamps = []

    def stamp(news: str = "") -> None:
        if settings.device.type == "cuda":
            torch.cuda.synchronize()  # the GPU may not have done yet what it was told to do
        stamps.append(time.perf_counter())

    with named("model.layers.0"):
        _, record = quantize_block(checkpoint, 0, x, short, stamp)

    # the time of the whole run, from the last two steps: by default one with a new mapping, one without
    per_step = (stamps[-1] - stamps[-3]) / 2 if settings.n_steps else 0
    per_sample = (record["seconds"] - record["initializing"] - record["training"]) / len(few)
    finishing = 4 / 3 * (per_step or per_sample) * settings.finish_steps  # a step of it has one forward pass more
    per_block = record["initializing"] + per_sample * settings.samples + per_step * settings.n_steps + finishing
    peak, total = peak_and_total(settings.device)
    print(f"{settings.device}: {peak / 1e9:.1f} GB of {total / 1e9:.1f} GB at the peak")
    print(f"{n_blocks} blocks of {settings.n_steps} steps, {per_step:.3f} seconds each: ", end="")
    print(f"about {n_blocks * per_block / 60:.0f} minutes, and the perplexities")


def measure_baselines(checkpoint: Checkpoint, windows: Tensor, settings: Settings, perplexities: dict) -> None:
    """Add the perplexity of the original, and of rtn with as many bits, where they are not known yet."""
    if "original" not in perplexities:
        perplexities["original"] = perplexity(checkpoint, windows, settings.device, label="original")

    def round_to_nearest(block: Block, i: int) -> None:
        rtn = replace(settings, method="rtn", feedback_passes=0, finish_steps=0)
        for name, layer in pack_layers(quantize_layers(checkpoint, block, i, rtn)).items():
            block.set_submodule(name, layer)

    if "rtn" not in perplexities and settings.method != "rtn":
        perplexities["rtn"] = perplexity(checkpoint, windows, settings.device, round_to_nearest, "rtn")


def complete(checkpoint: Checkpoint, windows: Tensor, settings: Settings, folder: Path, report: dict) -> None:
    """All blocks are there: write the rest of the files, measure what was written, complete the report.

    The perplexity is that of the files, read back."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if parallel.rank() == 0:
        if settings.dequantized:
            dequantize_blocks(checkpoint, folder, settings)
        quantization = {"quant_method": "flexbcq"} | settings.decisive() | versions
        if not report.get("finish"):
            quantization["finish_steps"] = 0
        write_rest(checkpoint, folder, settings, None if settings.dequantized else quantization)
    parallel.wait()

    written = Checkpoint(folder)
    value = perplexity(written, windows, settings.device, label=settings.method)
    report["perplexity"][settings.method] = value
    report |= {"bits_per_weight": stored_bits(written, check_layers(checkpoint, settings)[0])}
    report |= {"peak_bytes": peak_bytes(), "versions": versions}
    if parallel.rank() == 0:
        with whole_file(folder / "calibration.png") as temporary:
            plot(report["blocks"], f"{settings.method}, {settings.bits} bits", temporary)


def run(settings: Settings) -> None:
    """Check, rehearse, quantize, measure. Raises ValueError or OSError with one line."""
    start = time.perf_counter()

    # everything that can be checked beforehand
    checkpoint, settings = resolve(settings)
    weights, bits = check_layers(checkpoint, settings)
    fits = finish_fits(checkpoint, settings, weights)
    possible = settings if fits else replace(settings, finish_steps=0)
    check_space(checkpoint, possible, weights, bits)
    samples, others, windows, eval_name = load_texts(checkpoint, settings)
    check_perplexity(checkpoint, windows)
    check_weights(checkpoint, settings)
    rehearse(checkpoint, samples, windows, possible)
    if settings.dry_run:
        return

    texts = {"calibration text": torch.cat((samples, others)), "evaluation text": windows}
    with resumable(settings, checkpoint, texts) as (folder, report):
        earlier = [*report["blocks"], report.get("finish") or {"seconds": 0}]
        start -= sum(record["seconds"] for record in earlier)
        if settings.baselines:
            measure_baselines(checkpoint, windows, settings, report["perplexity"])
        calibrate(checkpoint, samples, settings, folder, report)
        if settings.finish_steps:
            if report.get("finish", fits):  # what an earlier run decided still holds
                finish(checkpoint, others, settings, folder, report)
            else:
                leave_out(folder, report)
        complete(checkpoint, windows, settings, folder, report)
        report |= {"text": eval_name, "eval_seq_len": settings.eval_seq_len, "eval_windows": len(windows)}
        report |= {"seconds": time.perf_counter() - start}
        report |= {"cpu_seconds": time.process_time()}  # without those of killed processes
        if parallel.rank() == 0:
            write_json(folder / REPORT, report)

    if parallel.rank() == 0:
        print_table(report["perplexity"], settings.bits, weights, checkpoint, Checkpoint(settings.out))
        print(f"{eval_name}, seq_len {settings.eval_seq_len}, {len(windows)} windows; ", end="")
        print(f"{report['seconds']:.0f} seconds; wrote {settings.out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Quantize a Llama (a Hugging Face folder) and write it as a packed checkpoint folder.",
        epilog="The defaults add stages of our own to the paper's method; --paper leaves them out and sets the rest "
        "as in the paper. Samples and epochs are the paper's by default; for the bundled model, add --epochs 20.",
    )
    preset = " ".join("--no-" + flag(k)[2:] if v is False else f"{flag(k)} {v}" for k, v in PAPER.items())
    parser.add_argument("--paper", action="store_const", const=PAPER, default={}, help=f"the paper's method: {preset}")
    add_options(parser, Settings)
    guarded(lambda args: run(Settings(**args.paper | {k: v for k, v in vars(args).items() if k != "paper"})), parser)


if __name__ == "__main__":
    main()
