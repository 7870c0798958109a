"""Quantize a Llama block by block and write it as a packed checkpoint folder.

    python calibrate.py                                                      # the bundled model, 3 bits
    python calibrate.py --model FOLDER --text wiki.train.raw --eval-text wiki.test.raw --bits 3 --group-size 128

For each decoder block, first to last: initialize its quantizers; train them so that the block, fed with what the
quantized blocks before it produce, returns what the original model returns there; pack it; go on. (Paper, section 4;
the block-wise scheme is that of Li et al. 2021, mixing in full-precision inputs is QDrop, Wei et al. 2022.)

In memory are the embedding, one block with its quantizers, and three sets of activations (samples, seq_len,
hidden_size) in float32 on the CPU: inputs on the original path, inputs on the quantized path, targets.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from eval import STANDARD_LIBRARY, TINY, batches, check_device, cut, default_device, guarded, load_tokenizer
from eval import perplexity, read_text, resolve_seq_len, standard_library_text, tokenize
from flexbcq import METHODS, FlexBCQLinear
from kernel import BCQLinear
from llama import Block, Checkpoint, linears, new_folder, rope_tables, write_config, write_index, write_shard

MAPPING_RATE, LEVEL_RATE = 5e-3, 5e-4  # learning rates at the start, for the factors s and for alpha and shift
PERIOD = 2  # steps between mappings
ORIGINAL_INPUT = 0.5  # share of input elements taken from the original path


def quantize_layers(block: Block, checkpoint: Checkpoint, i: int, args: argparse.Namespace, method: str, bar=None) -> dict[str, FlexBCQLinear]:
    """Swap every linear layer of block i for an initialized quantizer of the weight as it is stored in the file."""
    layers = {}
    for name, linear in linears(block).items():
        full_name = f"model.layers.{i}.{name}.weight"
        weight = checkpoint.tensor(full_name, linear.weight.shape).to(linear.weight.device)
        layers[name] = FlexBCQLinear(weight, args.bits, args.group_size, *METHODS[method])
        block.set_submodule(name, layers[name])
        if bar is not None:
            bar.update()
    return layers


def pack_layers(block: Block, layers: dict[str, FlexBCQLinear]) -> dict[str, BCQLinear]:
    """Swap every quantizer for its bit-planes: from here on the numbers are those of the file."""
    packed = {name: layer.pack() for name, layer in layers.items()}
    for name, layer in packed.items():
        block.set_submodule(name, layer)
    return packed


@torch.inference_mode()
def block_outputs(block: Block, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x: (samples, seq_len, hidden_size) on the CPU -> the block's output, likewise."""
    device = tables[0].device
    return torch.cat([block(part.to(device), *tables).cpu() for part in batches(x)])


def train_block(block, layers, original, quantized, target, tables, args, generator, bar) -> None:
    """Adam on the mean squared error of the block's output; changes the quantizers in place.

    original, quantized, target: (samples, seq_len, hidden_size) on the CPU; generator draws order and mixing;
    bar advances by one a step. Raises ValueError if the loss is not finite."""
    device = tables[0].device
    optimizer = torch.optim.Adam(
        [
            {"params": [p for layer in layers.values() for p in layer.mapping_parameters()], "lr": MAPPING_RATE},
            {"params": [p for layer in layers.values() for p in layer.level_parameters()], "lr": LEVEL_RATE},
        ],
        fused=True,
    )
    order = [part for _ in range(args.epochs) for part in torch.randperm(len(target), generator=generator).split(args.batch_size)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
    for step, chosen in enumerate(order):
        if step and step % PERIOD == 0:
            for layer in layers.values():
                layer.remap()
        from_original = torch.rand(quantized[chosen].shape, generator=generator) < ORIGINAL_INPUT
        x = torch.where(from_original, original[chosen], quantized[chosen])
        loss = F.mse_loss(block(x.to(device), *tables), target[chosen].to(device))
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()


def quantize_block(checkpoint: Checkpoint, i: int, original: Tensor, quantized: Tensor, tables, args, bar) -> tuple[Block, Tensor, Tensor, dict]:
    """One block from float to bit-planes. Returns it, its two outputs and its record for calibration.json."""
    start = time.time()
    block = checkpoint.block(i, device=tables[0].device)
    target = block_outputs(block, original, tables)
    layers = quantize_layers(block, checkpoint, i, args, args.method, bar)
    before = F.mse_loss(block_outputs(block, quantized, tables), target).item()
    bar.set_postfix_str(f"loss {before:.3e}")
    if args.trained:
        generator = torch.Generator().manual_seed(args.seed * 100_003 + i)
        train_block(block, layers, original, quantized, target, tables, args, generator, bar)
    pack_layers(block, layers)
    output = block_outputs(block, quantized, tables)
    after = F.mse_loss(output, target).item()
    return block, target, output, {"loss_before": before, "loss_after": after, "seconds": round(time.time() - start, 1)}


def save_block(block: Block, checkpoint: Checkpoint, i: int, folder: Path, dequantized: bool) -> None:
    """Write block i as one shard: bit-planes (or the weights they stand for) and everything else as it was."""
    prefix, tensors = f"model.layers.{i}.", {}
    for name, module in block.named_modules():
        if isinstance(module, BCQLinear) and dequantized:
            dtype = checkpoint.tensor(f"{prefix}{name}.weight", (module.out_features, module.in_features)).dtype
            tensors[f"{prefix}{name}.weight"] = module.dequantize(dtype)
        elif isinstance(module, BCQLinear):
            tensors |= {f"{prefix}{name}.{key}": t for key, t in module.state_dict().items()}
        else:
            names = (f"{name}.{key}" for key, _ in module.named_parameters(recurse=False))
            tensors |= {prefix + n: checkpoint.tensor(prefix + n, block.get_parameter(n).shape) for n in names}
    write_shard(folder, i, checkpoint.config.num_hidden_layers + 1, tensors)


def save_rest(checkpoint: Checkpoint, folder: Path, args: argparse.Namespace) -> None:
    """Embedding, norm and head as they were, the index of all shards, config.json and the tokenizer."""
    config = checkpoint.config
    shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size), "model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    rest = {name: checkpoint.tensor(name, shape) for name, shape in shapes.items()}
    write_shard(folder, config.num_hidden_layers, config.num_hidden_layers + 1, rest)
    write_index(folder)
    raw = dict(checkpoint.raw_config)
    if not args.dequantized:
        raw["quantization_config"] = {"quant_method": "flexbcq"} | settings(args)
    write_config(folder, raw, checkpoint.folder)


def settings(args: argparse.Namespace) -> dict:
    """Everything that decided the result, for config.json and calibration.json."""
    names = ("bits", "group_size", "method", "samples", "seq_len", "epochs", "batch_size", "seed")
    constants = {"mapping_rate": MAPPING_RATE, "level_rate": LEVEL_RATE, "period": PERIOD, "original_input": ORIGINAL_INPUT}
    versions = {"torch_version": torch.__version__, "python_version": platform.python_version()}
    return {name: getattr(args, name) for name in names} | constants | versions


def calibrate(checkpoint: Checkpoint, ids: Tensor, args: argparse.Namespace, folder: Path) -> list[dict]:
    """Quantize every block, in order, and write it to `folder`. ids: (samples, seq_len). Returns a record per block."""
    tables = rope_tables(checkpoint.config, ids.shape[1], args.device)
    n_blocks, records, start = checkpoint.config.num_hidden_layers, [], time.time()
    original = quantized = checkpoint.embedding()(ids)  # (samples, seq_len, hidden_size)
    n_steps = args.epochs * math.ceil(len(ids) / args.batch_size) if args.trained else 0
    for i in range(n_blocks):
        with tqdm(total=7 + n_steps, desc=f"block {i + 1}/{n_blocks}", unit="step") as bar:  # 7 linears to initialize
            try:
                block, original, quantized, record = quantize_block(checkpoint, i, original, quantized, tables, args, bar)
            except ValueError as error:
                raise ValueError(f"model.layers.{i}: {error}") from None
            left = (time.time() - start) / (i + 1) * (n_blocks - i - 1)
            bar.set_postfix_str(f"loss {record['loss_before']:.3e} -> {record['loss_after']:.3e}, {left / 60:.1f} min left")
        records.append(record)
        save_block(block, checkpoint, i, folder, args.dequantized)
    return records


def check_layers(checkpoint: Checkpoint, args: argparse.Namespace) -> float:
    """Stored bits per quantized weight, alpha and shift counted. Raises ValueError naming the layer that does not fit."""
    with torch.device("meta"):
        block = Block(checkpoint.config)
    stored = weights = 0
    for name, linear in linears(block).items():
        try:
            packed = BCQLinear(linear.in_features, linear.out_features, args.bits, args.group_size)
        except ValueError as error:
            raise ValueError(f"model.layers.0.{name}: {error}") from None
        stored += sum(8 * t.numel() * t.element_size() for t in packed.state_dict().values())
        weights += linear.weight.numel()
    return stored / weights


def load_texts(checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[Tensor, Tensor, str]:
    """Calibration samples (samples, seq_len), evaluation windows (n_windows, seq_len) and the name of their text.

    Samples start at random places. Without --eval-text the last tenth of --text is kept for evaluation."""
    tokenizer = load_tokenizer(checkpoint.folder)
    text, name = (read_text(args.text), Path(args.text).name) if args.text else (standard_library_text(False), STANDARD_LIBRARY)
    if args.eval_text:
        eval_text, eval_name = read_text(args.eval_text), Path(args.eval_text).name
    elif args.text:
        split = len(text) * 9 // 10
        text, eval_text, eval_name = text[:split], text[split:], f"last tenth of {name}"
    else:
        eval_text, eval_name = standard_library_text(held_out=True), name
    ids = tokenize(tokenizer, text, name, args.seq_len)
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(len(ids) - args.seq_len + 1, (args.samples,), generator=generator).tolist()
    samples = torch.stack([ids[start : start + args.seq_len] for start in starts])
    return samples, cut(tokenize(tokenizer, eval_text, eval_name, args.seq_len), args.seq_len), eval_name


def plot(records: list[dict], args: argparse.Namespace, path: Path) -> None:
    """Loss of each block before and after training."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    blocks = range(len(records))
    axes.semilogy(blocks, [r["loss_before"] for r in records], "o--", color="#D55E00", label="before training")
    axes.semilogy(blocks, [r["loss_after"] for r in records], "s-", color="#0072B2", label="as written")
    axes.set(xlabel="block", ylabel="mean squared error of the output", title=f"{args.method}, {args.bits} bits")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def size_mb(folder: Path) -> float:
    """Size of all weight files of a checkpoint folder, in MB."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def prepare(args: argparse.Namespace) -> Checkpoint:
    """Check everything that can be checked before the work starts and fill in the defaults that depend on the model."""
    args.device = check_device(args.device)
    checkpoint = Checkpoint(args.model)
    if checkpoint.config.quantization:
        raise ValueError(f"{args.model}: is quantized already; give the original model")
    args.out = Path(args.out or f"{checkpoint.folder.resolve().name}-{args.method}-{args.bits}bit")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise OSError(f"--out {args.out}: exists and is not empty; delete it or choose another folder")
    args.epochs, args.batch_size = (
        (args.epochs or 6, args.batch_size or 4) if checkpoint.folder.resolve() == TINY else (args.epochs or 20, args.batch_size or 1)
    )
    for name in ("samples", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    args.seq_len = resolve_seq_len(args.seq_len, checkpoint)
    args.trained = METHODS[args.method][0]  # a learned mapping needs gradients; rtn and bcq look at the weights alone
    return checkpoint


def run(args: argparse.Namespace) -> None:
    start, checkpoint = time.time(), prepare(args)
    bits = check_layers(checkpoint, args)
    samples, windows, eval_name = load_texts(checkpoint, args)

    def round_to_nearest(block: Block, i: int) -> None:
        pack_layers(block, quantize_layers(block, checkpoint, i, args, "rtn"))

    results = {"original": perplexity(checkpoint, windows, args.device, label="original")}
    if args.method != "rtn":
        results["rtn"] = perplexity(checkpoint, windows, args.device, round_to_nearest, "rtn")
    with new_folder(args.out) as folder:
        records = calibrate(checkpoint, samples, args, folder)
        save_rest(checkpoint, folder, args)
        results[args.method] = perplexity(Checkpoint(folder), windows, args.device, label=args.method)  # of the files
        seconds = round(time.time() - start, 1)
        report = {"settings": settings(args), "bits_per_weight": bits, "perplexity": results, "seconds": seconds, "blocks": records}
        (folder / "calibration.json").write_text(json.dumps(report | {"text": eval_name}, indent=2) + "\n", "utf-8")
        plot(records, args, folder / "calibration.png")

    before, after = size_mb(checkpoint.folder), size_mb(args.out)
    print(f"\n{'':20}{'perplexity':>12}{'bits per weight':>18}{'files':>12}")
    for name, value in results.items():
        label, numbers = (name, (16, before)) if name == "original" else (f"{name}, {args.bits} bits", (bits, after))
        print(f"{label:20}{value:12.3f}{numbers[0]:18.3f}{numbers[1]:9.1f} MB")
    print(f"{eval_name}, seq_len {args.seq_len}, {len(windows)} windows; {seconds:.0f} seconds; wrote {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Quantize a Llama (a Hugging Face folder) and write it as a packed checkpoint folder.",
        epilog="Defaults are the paper's setting, within the model's context; for the bundled model, one of three minutes.",
    )
    parser.add_argument("--model", default=TINY, help="checkpoint folder (default: the bundled models/tiny)")
    parser.add_argument("--out", help="new folder to write (default: MODEL-METHOD-BITSbit in the current one)")
    parser.add_argument("--method", choices=METHODS, default="flexbcq", help="(default: %(default)s)")
    parser.add_argument("--bits", type=int, default=3, help="bit-planes per weight, 1 to 8 (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=-1, help="weights sharing alpha and shift, a multiple of 32; -1: a row (default: %(default)s)")
    parser.add_argument("--text", help=f"UTF-8 file to calibrate on (default: {STANDARD_LIBRARY})")
    parser.add_argument("--eval-text", help="UTF-8 file for perplexity (default: the last tenth of --text, then not calibrated on)")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, help="tokens in each (default: 2048, or the model's context if smaller)")
    parser.add_argument("--epochs", type=int, help="passes over the samples for each block (default: 20; bundled model: 6)")
    parser.add_argument("--batch-size", type=int, help="sequences a step (default: 1; bundled model: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of samples, their order and mixing (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--dequantized", action="store_true", help="write ordinary weights, rounded to what the planes hold, for other software")
    guarded(run, parser)


if __name__ == "__main__":
    main()
