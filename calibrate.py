"""Quantize a Llama block by block and write it as a packed checkpoint folder.

    python calibrate.py                                                      # the bundled model, 3 bits
    python calibrate.py --model FOLDER --text wiki.train.raw --eval-text wiki.test.raw --bits 3 --group-size 128

For each decoder block, first to last: initialize its quantizers; train them so that the block, fed with what the
quantized blocks before it produce, returns what the original model returns there; pack it; write it; go on. (Block by
block as in BRECQ, Li et al. 2021; mixing in inputs of the original model as in QDrop, Wei et al. 2022.)

In memory are the embedding, one block with its quantizers, and three sets of activations (samples, seq_len,
hidden_size) in float32 on the CPU: inputs on the original path, inputs on the quantized path, targets.
"""

import argparse
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from eval import TINY, batches, check_device, cut, default_device, guarded
from eval import load_text, load_tokenizer, perplexity, resolve_seq_len, tokenize
from flexbcq import METHODS, FlexBCQLinear
from kernel import BCQLinear
from llama import Block, Checkpoint, linears, open_tensors, rope_tables
from llama import whole_file, write_config, write_index, write_json, write_tensors
from resume import REPORT, fingerprints, resumable


@dataclass
class Training:
    """How the quantizers of a block are trained; the defaults are the paper's."""

    epochs: int = 20  # passes over the samples
    batch_size: int = 1  # sequences in a step
    seed: int = 0  # of samples, order and mixing
    mapping_rate: float = 5e-3  # learning rate of scale, s_elem and s_row, falling to 0 as a cosine
    level_rate: float = 5e-4  # learning rate of alpha and shift, likewise
    period: int = 2  # steps from one mapping to the next
    original_input: float = 0.5  # share of input elements that come from the original model


QUICK_EPOCHS = 1  # for the bundled model: less than three minutes on two CPU cores


def quantize_layers(checkpoint: Checkpoint, block: Block, i: int, method: str, n_bits: int, group_size: int):
    """Swap every linear layer of block i for a quantizer of the weight as it is stored. Yields (name, quantizer)."""
    for name, linear in linears(block).items():
        weight = checkpoint.tensor(f"model.layers.{i}.{name}.weight").to(linear.weight.device)
        quantizer = FlexBCQLinear(weight, n_bits, group_size, *METHODS[method])
        block.set_submodule(name, quantizer)
        yield name, quantizer


def pack_layers(block: Block, quantizers: dict[str, FlexBCQLinear]) -> dict[str, BCQLinear]:
    """Swap every quantizer for its bit-planes: from here on the numbers are those of the file."""
    packed = {name: quantizer.pack() for name, quantizer in quantizers.items()}
    for name, layer in packed.items():
        block.set_submodule(name, layer)
    return packed


@torch.inference_mode()
def block_outputs(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (samples, seq_len, hidden_size) on the CPU -> the block's output, likewise."""
    return torch.cat([block(part.to(cos.device), cos, sin).cpu() for part in batches(x)])


def train_block(
    block: Block, quantizers: list[FlexBCQLinear], inputs: tuple[Tensor, Tensor], target: Tensor,
    rope: tuple[Tensor, Tensor], settings: Training, generator: torch.Generator, advance=lambda: None,
) -> None:  # fmt: skip
    """Adam on the mean squared error of the block's output; changes the quantizers in place.

    inputs: from the original and from the quantized blocks before; they and target: (samples, seq_len, hidden_size)
    rope: cos and sin, on the device of the block; generator: draws order and mixing; advance: called after each step
    Raises ValueError if the loss is not finite."""
    levels = {"params": [p for q in quantizers for p in q.level_parameters()], "lr": settings.level_rate}
    mapping = {"params": [p for q in quantizers for p in q.mapping_parameters()], "lr": settings.mapping_rate}
    optimizer = torch.optim.Adam([mapping, levels], fused=True)
    epochs = [torch.randperm(len(target), generator=generator) for _ in range(settings.epochs)]
    order = [chosen for epoch in epochs for chosen in epoch.split(settings.batch_size)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
    for step, chosen in enumerate(order):
        if step and step % settings.period == 0:
            for quantizer in quantizers:
                quantizer.remap()
        original, quantized = (x[chosen] for x in inputs)
        mixed = torch.where(
            torch.rand(original.shape, generator=generator) < settings.original_input, original, quantized
        )
        loss = F.mse_loss(block(mixed.to(rope[0].device), *rope), target[chosen].to(rope[0].device))
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance()


def quantize_block(checkpoint, i, inputs, rope, args, settings, bar) -> tuple[dict[str, BCQLinear], tuple, dict]:
    """Block i from float to bit-planes. Returns its packed layers, the inputs of the next block and its record."""
    start, (original, quantized) = time.time(), inputs
    block = checkpoint.block(i, device=args.device)
    target = block_outputs(block, original, *rope)
    quantizers = {}
    for name, quantizer in quantize_layers(checkpoint, block, i, args.method, args.bits, args.group_size):
        quantizers[name] = quantizer
        bar.update()
    before = F.mse_loss(block_outputs(block, quantized, *rope), target).item()
    bar.set_postfix_str(f"loss {before:.3e}")
    if is_trained(args.method):
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + i)
        train_block(block, list(quantizers.values()), inputs, target, rope, settings, generator, bar.update)
    packed = pack_layers(block, quantizers)
    output = block_outputs(block, quantized, *rope)
    record = {"loss_before": before, "loss_after": F.mse_loss(output, target).item(), "seconds": time.time() - start}
    return packed, (target, output), record


def is_trained(method: str) -> bool:
    """A learned mapping needs gradients; rtn and bcq look at the weights alone."""
    return METHODS[method][0]


def repeat_block(checkpoint, i, inputs, rope, args, folder) -> tuple[Tensor, Tensor]:
    """The inputs of the block after block i, which an earlier run has finished."""
    original, quantized = inputs
    block = checkpoint.block(i, device=args.device)
    target = block_outputs(block, original, *rope)
    for name, layer in read_block(checkpoint, i, folder, args).items():
        block.set_submodule(name, layer.to(args.device))
    return target, block_outputs(block, quantized, *rope)


def calibrate(checkpoint: Checkpoint, ids: Tensor, args, settings: Training, folder: Path, report: dict) -> None:
    """Quantize every block, in order, and write it to `folder`; those in the report are finished already.

    ids: (samples, seq_len); report: as in resume.py, here it gets a record per block"""
    rope = rope_tables(checkpoint.config, ids.shape[1], args.device)
    n_blocks, records = checkpoint.config.num_hidden_layers, report["blocks"]
    if len(records) == n_blocks:
        return
    x = checkpoint.embed(ids)  # (samples, seq_len, hidden_size)
    inputs = x, x
    for i in tqdm(range(len(records)), desc="finished blocks again, forward only", unit="block", leave=False):
        inputs = repeat_block(checkpoint, i, inputs, rope, args, folder)
    n_steps = settings.epochs * math.ceil(len(ids) / settings.batch_size) if is_trained(args.method) else 0
    for i in range(len(records), n_blocks):
        with tqdm(total=7 + n_steps, desc=f"block {i + 1}/{n_blocks}", unit="step") as bar:  # 7 linears to initialize
            try:
                packed, inputs, record = quantize_block(checkpoint, i, inputs, rope, args, settings, bar)
            except ValueError as error:
                raise ValueError(f"model.layers.{i}: {error}") from None
            write_block(checkpoint, i, packed, folder)
            write_json(folder / REPORT, report | {"blocks": [*records, record]})
            records.append(record)
            left = sum(r["seconds"] for r in records) / len(records) * (n_blocks - i - 1) / 60
            bar.set_postfix_str(
                "loss {loss_before:.3e} -> {loss_after:.3e}".format(**record) + f", {left:.1f} min left"
            )


def shard(checkpoint: Checkpoint, i: int, folder: Path) -> Path:
    """The file of block i; the one after the last block holds the rest."""
    return folder / f"model-{i + 1:05d}-of-{checkpoint.config.num_hidden_layers + 1:05d}.safetensors"


def write_block(checkpoint: Checkpoint, i: int, packed: dict[str, BCQLinear], folder: Path, dequantized=False) -> None:
    """Block i as a shard: bit-planes, or the weights they stand for, and the norms as they were."""
    prefix = f"model.layers.{i}."
    tensors = checkpoint.tensors(lambda name: name.startswith(prefix))
    for name, layer in packed.items():
        weight = tensors.pop(f"{prefix}{name}.weight")
        stored = {"weight": layer.dequantize(weight.dtype)} if dequantized else layer.state_dict()
        tensors |= {f"{prefix}{name}.{key}": t for key, t in stored.items()}
    write_tensors(shard(checkpoint, i, folder), tensors)


def read_block(checkpoint: Checkpoint, i: int, folder: Path, args) -> dict[str, BCQLinear]:
    """The packed layers of block i from its shard; none if it was dequantized already."""
    with torch.device("meta"):
        block, packed = Block(checkpoint.config), {}
    with open_tensors(shard(checkpoint, i, folder)) as file:
        for name, linear in linears(block).items():
            if f"model.layers.{i}.{name}.bit_planes" in file.keys():
                layer = packed[name] = BCQLinear(linear.in_features, linear.out_features, args.bits, args.group_size)
                layer.load_state_dict(
                    {key: file.get_tensor(f"model.layers.{i}.{name}.{key}") for key in layer.state_dict()}
                )
    return packed


def dequantize_blocks(checkpoint: Checkpoint, folder: Path, args) -> None:
    """Replace the bit-planes of every shard by ordinary weights. Only when all blocks are finished: going on with an
    unfinished calibration takes the planes."""
    for i in range(checkpoint.config.num_hidden_layers):
        if packed := read_block(checkpoint, i, folder, args):
            write_block(checkpoint, i, packed, folder, dequantized=True)


def write_rest(checkpoint: Checkpoint, folder: Path, quantization: dict | None) -> None:
    """Embedding, norm and head as they were, the index of all shards, config.json and the tokenizer."""
    rest = checkpoint.tensors(lambda name: not name.startswith("model.layers."))
    write_tensors(shard(checkpoint, checkpoint.config.num_hidden_layers, folder), rest)
    write_index(folder)
    config = checkpoint.raw_config | ({"quantization_config": quantization} if quantization else {})
    write_config(folder, config, checkpoint.folder)


def check_layers(checkpoint: Checkpoint, n_bits: int, group_size: int) -> float:
    """Stored bits per quantized weight, alpha and shift counted. Raises ValueError naming a layer that does not fit."""
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
    return stored / weights


def load_texts(checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[Tensor, Tensor, str]:
    """Calibration samples (samples, seq_len), evaluation windows (n_windows, seq_len) and the name of their text.

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
    return samples, cut(tokenize(tokenizer, eval_text, eval_name, args.seq_len), args.seq_len)[::every], eval_name


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


def print_table(perplexities: dict[str, float], n_bits: int, bits: float, source: Path, folder: Path) -> None:
    """A line per model: perplexity, stored bits per quantized weight, size of the weight files."""
    before, after = (sum(f.stat().st_size for f in path.glob("*.safetensors")) / 1e6 for path in (source, folder))
    print(f"\n{'':20}{'perplexity':>12}{'bits per weight':>18}{'files':>12}")
    for name, value in perplexities.items():
        label, stored, size = (name, 16, before) if name == "original" else (f"{name}, {n_bits} bits", bits, after)
        print(f"{label:20}{value:12.3f}{stored:18.3f}{size:9.1f} MB")


def prepare(args: argparse.Namespace) -> tuple[Checkpoint, Training]:
    """Check the options and fill in the defaults that depend on the model. Raises ValueError or OSError."""
    args.device = check_device(args.device)
    checkpoint = Checkpoint(args.model)
    if checkpoint.config.quantization:
        raise ValueError(f"{args.model}: is quantized already; give the original model")
    args.out = Path(args.out or f"{checkpoint.folder.resolve().name}-{args.method}-{args.bits}bit")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise OSError(f"--out {args.out}: exists and is not empty; delete it or choose another folder")
    if not os.access(args.out.parent, os.W_OK | os.X_OK):
        raise OSError(f"--out {args.out}: {args.out.parent} is no folder that can be written to; create it first")
    args.seq_len = resolve_seq_len(args.seq_len, checkpoint)
    if args.epochs is None:
        args.epochs = QUICK_EPOCHS if checkpoint.folder.resolve() == TINY else Training.epochs
    for option, value in (("samples", args.samples), ("epochs", args.epochs), ("batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"--{option} {value}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: choose 0 to {2**32 - 1}")
    needed = 3 * 4 * args.samples * args.seq_len * checkpoint.config.hidden_size / 1e9
    if needed > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9):
        raise ValueError(
            f"--samples {args.samples}: their activations take {needed:.0f} GB, this machine has {there:.0f}; "
            "give fewer, or a smaller --seq-len"
        )
    return checkpoint, Training(args.epochs, args.batch_size, args.seed)


def run(args: argparse.Namespace) -> None:
    start, (checkpoint, settings) = time.time(), prepare(args)
    bits = check_layers(checkpoint, args.bits, args.group_size)
    samples, windows, eval_name = load_texts(checkpoint, args)

    def round_to_nearest(block: Block, i: int) -> None:
        pack_layers(block, dict(quantize_layers(checkpoint, block, i, "rtn", args.bits, args.group_size)))

    chosen = {key: getattr(args, key) for key in ("method", "bits", "group_size", "dequantized", "samples", "seq_len")}
    chosen |= asdict(settings)
    inputs = fingerprints(checkpoint.folder, {"calibration text": samples, "evaluation text": windows})
    with resumable(args.out, {"settings": chosen, "inputs": inputs}) as (folder, report):
        start -= sum(record["seconds"] for record in report["blocks"])  # of earlier runs
        perplexities = report["perplexity"]
        if "original" not in perplexities:
            perplexities["original"] = perplexity(checkpoint, windows, args.device, label="original")
        if "rtn" not in perplexities and args.method != "rtn":
            perplexities["rtn"] = perplexity(checkpoint, windows, args.device, round_to_nearest, "rtn")
        calibrate(checkpoint, samples, args, settings, folder, report)
        if args.dequantized:
            dequantize_blocks(checkpoint, folder, args)
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        packed = {"quant_method": "flexbcq"} | chosen | versions
        write_rest(checkpoint, folder, None if args.dequantized else packed)
        perplexities[args.method] = perplexity(Checkpoint(folder), windows, args.device, label=args.method)  # the files
        seconds = time.time() - start
        report |= {"text": eval_name, "bits_per_weight": bits, "seconds": seconds, "versions": versions}
        write_json(folder / REPORT, report)
        with whole_file(folder / "calibration.png") as temporary:
            plot(report["blocks"], f"{args.method}, {args.bits} bits", temporary)
    print_table(perplexities, args.bits, bits, checkpoint.folder, args.out)
    print(f"{eval_name}, seq_len {args.seq_len}, {len(windows)} windows; {seconds:.0f} seconds; wrote {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Quantize a Llama (a Hugging Face folder) and write it as a packed checkpoint folder.",
        epilog="The defaults are the paper's setting; for the bundled model, one of three minutes.",
    )
    add = parser.add_argument
    add("--model", default=TINY, help="checkpoint folder (default: the bundled models/tiny)")
    add("--out", help="new folder to write (default: MODEL-METHOD-BITSbit in the current one)")
    add("--method", choices=METHODS, default="flexbcq", help="(default: %(default)s)")
    add("--bits", type=int, default=3, help="bit-planes per weight, 1 to 8 (default: %(default)s)")
    add("--group-size", type=int, default=-1, help="weights sharing alpha and shift, a multiple of 32; -1: the row "
        "(default: %(default)s)")  # fmt: skip
    add("--text", help="UTF-8 file to calibrate on (default: the Python standard library)")
    add("--eval-text", help="UTF-8 file for perplexity (default: the last tenth of --text, not calibrated on then)")
    add("--samples", type=int, default=128, help="calibration sequences (default: %(default)s)")
    add("--seq-len", type=int, help="tokens in each (default: 2048, or the model's context if smaller)")
    add("--epochs", type=int, help=f"passes over the samples (default: {Training.epochs}; bundled: {QUICK_EPOCHS})")
    add("--batch-size", type=int, default=Training.batch_size, help="sequences in a step (default: %(default)s)")
    add("--seed", type=int, default=0, help="of samples, their order and mixing (default: %(default)s)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--dequantized", action="store_true", help="write ordinary weights, rounded to what the planes hold, "
        "for other software")  # fmt: skip
    guarded(run, parser)


if __name__ == "__main__":
    main()
