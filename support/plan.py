"""Before and after a calibration: the checks, what it needs in disk and memory, its table and its plot."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from flexbcq import check_fp16
from kernel import BCQLinear, bits_per_weight, forced_path
from llama import Block, linears
from support import parallel
from support.checkpoint import Checkpoint, side_files
from support.command import check_device, named
from support.data import resolve_seq_len
from support.hub import model_folder
from support.resume import check_out, partial_folder
from support.settings import HELD_OUT, TINY, Settings

EPOCHS, QUICK_EPOCHS = 20, 1  # of the paper; of the bundled model, less than three minutes on two CPU cores


def resolve(settings: Settings) -> tuple[Checkpoint, Settings]:
    """The model, and the settings with what depends on it or on the machine filled in. Raises ValueError or OSError."""
    forced_path()  # is it one?
    device = check_device(parallel.own_device(str(settings.device)))
    parallel.start(device.type)

    checkpoint = Checkpoint(model_folder(settings.model))
    if checkpoint.config.quantization:
        raise ValueError(f"{settings.model}: is quantized already; give the original model")
    name = settings.model.resolve().name if settings.model.is_dir() else settings.model.name.partition("@")[0]
    is_bundled = checkpoint.folder.resolve() == TINY
    seq_len = resolve_seq_len(settings.seq_len, checkpoint)
    eval_seq_len = seq_len if settings.eval_seq_len is None else settings.eval_seq_len

    settings = replace(
        settings,
        device=device,
        out=settings.out or Path(f"{name}-{settings.method}-{settings.bits}bit"),
        seq_len=seq_len,
        eval_seq_len=resolve_seq_len(eval_seq_len, checkpoint, "--eval-seq-len"),
        epochs=settings.epochs or (QUICK_EPOCHS if is_bundled else EPOCHS),
        batch_size=settings.batch_size or parallel.world(),
    )
    check_folders(checkpoint, settings)
    if settings.samples % settings.batch_size or settings.batch_size % parallel.world():
        raise ValueError(
            f"--batch-size {settings.batch_size}: must divide --samples {settings.samples} and be a multiple of the "
            f"number of processes ({parallel.world()})"
        )
    return checkpoint, settings


def check_folders(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raises OSError if something could not be written or copied at the end of the run."""
    check_out(settings.out)
    folder = settings.out.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"--out {settings.out}: {folder} is not a writable folder; create it or give another")
    for file in side_files(checkpoint.folder):
        file.open("rb").close()  # can it be read?

    if settings.offload and not os.access(settings.offload, os.W_OK | os.X_OK):
        raise OSError(f"--offload {settings.offload}: not a writable folder; create it or give another")
    if settings.offload and sys.platform == "win32":
        raise OSError("--offload: Windows cannot delete a file that is in use, so it would stay behind; leave it out")


def check_layers(checkpoint: Checkpoint, settings: Settings) -> tuple[int, float]:
    """Weights to quantize in a block, and stored bits for each, alpha and shift counted.

    Raises ValueError naming a layer that does not fit."""
    with torch.device("meta"):
        block = Block(checkpoint.config)

    weights = stored = 0
    for name, linear in linears(block).items():
        with named(f"model.layers.0.{name}"):
            packed = BCQLinear(linear.in_features, linear.out_features, settings.bits, settings.group_size)
        weights += linear.weight.numel()
        stored += sum(8 * t.numel() * t.element_size() for t in packed.state_dict().values())
    return weights, stored / weights


def check_weights(checkpoint: Checkpoint, settings: Settings) -> None:
    """Read every weight that will be quantized. Raises ValueError naming the first that cannot be stored."""
    with torch.device("meta"):
        names = list(linears(Block(checkpoint.config)))
    blocks = range(checkpoint.config.num_hidden_layers)
    bits = {f"model.layers.{i}.{name}": settings.bits for i in blocks for name in names}
    bits |= dict.fromkeys(checkpoint.head_names if settings.head_bits else (), settings.head_bits)

    for name, n_bits in tqdm(bits.items(), desc="reading weights", unit="layer", leave=False):
        with named(name):
            weight = checkpoint.tensor(f"{name}.weight")
            check_fp16(weight, n_bits)
            if is_coarse(weight, n_bits):
                print(f"{name}: weights this small lose accuracy, as levels are stored in fp16")


def is_coarse(weight: Tensor, n_bits: int) -> bool:
    """Whether the smallest alpha of this weight will be less than about 8 of the smallest steps of fp16.

    >>> is_coarse(torch.tensor([1e-5]), 4), is_coarse(torch.tensor([1e-6]), 4)
    (False, True)"""
    return 0 < weight.abs().max().item() / 2**n_bits < 8 * 2**-24


def check_space(checkpoint: Checkpoint, settings: Settings, weights: int, bits: float) -> None:
    """Print what will be needed on the host. Raises ValueError if there is less of it.

    weights, bits: as `check_layers` returns them"""
    config = checkpoint.config
    n_blocks = config.num_hidden_layers

    # the new files, without those left by an interrupted run that we continue
    stored = checkpoint.file_size()
    if not settings.dequantized:
        stored += n_blocks * weights * bits / 8 - checkpoint.n_bytes(is_quantized)
        if settings.head_bits:
            head = bits_per_weight(settings.head_bits, config.hidden_size) / 8
            stored += n_head_weights(checkpoint) * head - checkpoint.n_bytes(is_head)
    if settings.finish_steps:  # writes the blocks again before it deletes those from before
        stored += n_blocks * weights * bits / 8
    already_there = sum(file.stat().st_size for file in partial_folder(settings.out).glob("*.safetensors"))
    needs = {f"--out {settings.out}": (stored - already_there, shutil.disk_usage(settings.out.parent).free)}

    # three sets of activations in bf16; after them, for the finish, one in float32
    token = settings.seq_len * config.hidden_size
    activations = 3 * 2 * settings.samples * token
    if settings.offload:
        needs[f"--offload {settings.offload}"] = activations, shutil.disk_usage(settings.offload).free
    else:
        needs[f"--samples {settings.samples}, activations in memory"] = activations, psutil.virtual_memory().total
    if settings.finish_steps:
        states = 4 * (HELD_OUT + settings.finish_steps * settings.batch_size) * token
        needs[f"--finish-steps {settings.finish_steps}, states in memory"] = states, psutil.virtual_memory().total

    for name, (needed, available) in needs.items():
        check_one(name, needed, available)


def check_perplexity(checkpoint: Checkpoint, windows: Tensor) -> None:
    """Print what a perplexity keeps in memory, in float32. Raises ValueError if there is less of it.

    windows: (n_windows, seq_len)"""
    needed = 4 * windows.numel() * checkpoint.config.hidden_size
    check_one(f"--eval-windows {len(windows)}, states in memory", needed, psutil.virtual_memory().total)


def check_one(name: str, needed: float, available: float) -> None:
    """Print both numbers of bytes. Raises ValueError if there is less than needed."""
    print(f"{name}: {needed / 1e9:.3f} GB of {available / 1e9:.1f} GB")
    if needed > available:
        raise ValueError(
            f"{name}: needs {needed / 1e9:.3f} GB, but there are only {available / 1e9:.3f} GB; free some or use less"
        )


def finish_fits(checkpoint: Checkpoint, settings: Settings, weights: int) -> bool:
    """Print what the finish needs in the memory of the device. Whether it is there, on the devices of all processes.

    weights: to quantize in a block. The rest, one block with its activations, has been there for the blocks"""
    if not settings.finish_steps:
        return True
    config = checkpoint.config
    group_size = config.hidden_size if settings.group_size == -1 else settings.group_size
    per_weight = 1 + 20 * (settings.bits + 1) / group_size  # a code; five floats for each alpha and shift
    needed = config.num_hidden_layers * weights * per_weight
    needed += 4 * config.num_hidden_layers * settings.seq_len * config.hidden_size  # inputs of all blocks
    needed += 4 * config.vocab_size * config.hidden_size  # the head
    total = peak_and_total(settings.device)[1]

    print(f"--finish-steps {settings.finish_steps}: {needed / 1e9:.3f} GB of {total / 1e9:.1f} GB, on top of one block")
    fits = parallel.mean(needed < total) == 1
    if not fits:
        print("not enough memory, here or on another device: going on without the finish")
    return fits


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes; where the system keeps no record of it, what it has now."""
    try:
        import resource  # not on Windows
    except ImportError:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory: the peak of this process so far, and what there is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    return peak_bytes(), psutil.virtual_memory().total


# -------------------------------------------------------------------------------------------------------- the report


def is_quantized(name: str) -> bool:
    """Whether a tensor of this name belongs to a quantized weight."""
    return "_proj." in name and not name.endswith(".bias")


def is_head(name: str) -> bool:
    """Whether a tensor of this name belongs to embedding or lm_head."""
    return name.startswith(("model.embed_tokens.", "lm_head."))


def n_head_weights(checkpoint: Checkpoint) -> int:
    """Number of weights in embedding and lm_head; a tensor that serves both counts once."""
    return len(checkpoint.head_names) * checkpoint.config.vocab_size * checkpoint.config.hidden_size


def stored_bits(checkpoint: Checkpoint, weights: int) -> float:
    """Bits per quantized weight of the blocks as stored on disk, alpha and shift included. weights: in a block"""
    return 8 * checkpoint.n_bytes(is_quantized) / (checkpoint.config.num_hidden_layers * weights)


def print_table(
    perplexities: dict[str, float], bits: int, weights: int, source: Checkpoint, written: Checkpoint
) -> None:
    """A line per model: perplexity, stored bits per quantized weight, size of the weight files. weights: in a block

    If embedding and lm_head are quantized, a line below says how large they are. The perplexity of rtn is with the
    original ones, its size with the quantized ones."""
    print(f"\n{'':20}{'perplexity':>12}{'bits per weight':>18}{'files':>12}")
    for name, value in perplexities.items():
        checkpoint = source if name == "original" else written
        label = name if name == "original" else f"{name}, {bits} bits"
        size = f"{checkpoint.file_size() / 1e6:9.1f} MB"
        print(f"{label:20}{value:12.3f}{stored_bits(checkpoint, weights):18.3f}{size}")

    if written.config.quantization and written.config.quantization["head_bits"]:
        size = written.n_bytes(is_head)
        print(f"embedding and lm_head: {8 * size / n_head_weights(written):.3f} bits per weight, ", end="")
        print(f"{size / 1e6:.1f} MB of the files")


def plot(records: list[dict], title: str, path: Path) -> None:
    """Loss of each block before and after training."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    blocks = range(1, len(records) + 1)
    axes.semilogy(blocks, [r["loss_before"] for r in records], "o--", color="#D55E00", label="before training")
    axes.semilogy(blocks, [r["loss_after"] for r in records], "s-", color="#0072B2", label="after training")
    axes.set(xlabel="block", ylabel="mean squared error of the block's output", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
