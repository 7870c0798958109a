"""Calibration of one decoder block: the part of calibrate.py that is in the paper.

Initialize the quantizers of the block; train them so that the block, fed with what the quantized blocks before it
produce, returns what the original model returns there; pack it. (Block by block as in BRECQ, Li et al. 2021; mixing in
inputs of the original model as in QDrop, Wei et al. 2022.)

In memory are the block with its quantizers and, on the host, three sets of activations, (samples, seq_len,
hidden_size) in bf16: inputs on the original path, inputs on the quantized path, targets. Arithmetic is in float32.
"""

import math
import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import parallel
from eval import batches
from flexbcq import METHODS, FlexBCQLinear
from kernel import BCQLinear
from llama import Block, Checkpoint, linears


def switch(default: float, low: float, high: float, text: str):
    """A field that only an ablation changes: its smallest and largest value, what it does."""
    return field(default=default, metadata={"range": (low, high), "help": text})


@dataclass
class Training:
    """How the quantizers of a block are made and trained: as in the paper but for learn_shift, n_ratios, importance."""

    epochs: int = 20  # passes over the samples
    batch_size: int = 1  # sequences in a step, of all processes together
    seed: int = 0  # of samples, order and mixing
    mapping_rate: float = switch(5e-3, 0, 1, "learning rate of scale, s_elem and s_row, falling to 0 as a cosine")
    level_rate: float = switch(5e-4, 0, 1, "learning rate of alpha and shift, likewise")
    period: int = switch(2, 1, math.inf, "steps from one mapping to the next")
    local: bool = switch(True, 0, 1, "a new mapping compares a level with its neighbours only, not with all")
    tau: float = switch(1.0, 0, 1e9, "gradients flow where the level is at most so many times the smallest alpha away")
    learn_shift: bool = switch(True, 0, 1, "the shift is trained like alpha")
    original_input: float = switch(0.5, 0, 1, "share of the input elements that come from the original model")
    n_ratios: int = switch(10, 1, math.inf, "clipping ratios that the initialization tries")
    n_rounds: int = switch(15, 0, math.inf, "of alternating update, from each; 0: uniform levels, as rtn has them")
    importance: bool = switch(True, 0, 1, "initialize for the inputs that the layers see, not for the weights alone")


def is_trained(method: str) -> bool:
    """A learned mapping needs gradients; rtn and bcq are done when they are initialized."""
    return METHODS[method][0]


def quantize_layers(
    checkpoint: Checkpoint, block: Block, i: int, method: str, n_bits: int, group_size: int,
    settings: Training = Training(), importance: dict[str, Tensor] = {},
):  # fmt: skip
    """Swap every linear layer of block i for a quantizer of the weight as it is stored. Yields (name, quantizer).

    importance: by name what `FlexBCQLinear` takes; without a name, None"""
    for name, linear in linears(block).items():
        weight = checkpoint.tensor(f"model.layers.{i}.{name}.weight").to(linear.weight.device)
        quantizer = FlexBCQLinear(
            weight, n_bits, group_size, *METHODS[method], settings.n_ratios, settings.n_rounds, importance.get(name),
            settings.tau,
        )  # fmt: skip
        if not settings.learn_shift:
            quantizer.shift.requires_grad_(False)
        block.set_submodule(name, quantizer)
        yield name, quantizer


def pack_layers(block: Block, quantizers: dict[str, FlexBCQLinear]) -> dict[str, BCQLinear]:
    """Swap every quantizer for its bit-planes: from here on the numbers are those of the file."""
    packed = {name: quantizer.pack() for name, quantizer in quantizers.items()}
    for name, layer in packed.items():
        block.set_submodule(name, layer)
    return packed


def activations(shape: tuple[int, ...], folder: str | None) -> Tensor:
    """An empty bf16 tensor, in memory or in a file of `folder`. Raises OSError if the disk is full.

    The file loses its name at once and its space with the process: nothing is left behind, however that ends."""
    if folder is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    size = math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, 2 * size)  # a write to a mapped file has no way to say "disk full"
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16).view(shape)


@torch.inference_mode()
def forward(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Write the block's output on x to out, which may be x; both (samples, seq_len, hidden_size) on the host."""
    for part, place in zip(batches(x), batches(out)):
        place.copy_(block(part.to(rope[0].device).float(), *rope).bfloat16())  # half the bytes to and from a GPU


@contextmanager
def input_squares(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """By name of each layer, (in_features,): the sum of squares of each input over all tokens that pass while this is
    open; at the end, the mean of these sums over the processes."""
    names = {linear: name for name, linear in layers.items()}
    squares = {name: linear.weight.new_zeros(linear.in_features).double() for linear, name in names.items()}

    def add(linear: nn.Linear, inputs: tuple[Tensor]) -> None:
        squares[names[linear]] += inputs[0].square().sum((0, 1), dtype=torch.float64)

    hooks = [linear.register_forward_pre_hook(add) for linear in names]
    yield squares
    for hook in hooks:
        hook.remove()
    parallel.average(squares.values())


@torch.inference_mode()
def output_error(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], target: Tensor, replace: bool = False) -> float:
    """Mean squared error of the block's output on x, over the samples of all processes. Shapes as in `forward`.

    replace: write the output over x"""
    error = 0.0
    for part, wanted in zip(batches(x), batches(target)):
        y = block(part.to(rope[0].device).float(), *rope)
        error += F.mse_loss(y, wanted.to(y.device).float(), reduction="sum").item()
        if replace:
            part.copy_(y.bfloat16())
    return parallel.mean(error / x.numel())


def train_block(
    block: Block, quantizers: list[FlexBCQLinear], inputs: tuple[Tensor, Tensor], target: Tensor,
    rope: tuple[Tensor, Tensor], settings: Training, seed: int, advance: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Adam on the mean squared error of the block's output; changes the quantizers in place.

    inputs: from the original and from the quantized blocks before; they and target: (samples, seq_len, hidden_size)
    rope: cos and sin, on the device of the block; seed: of order and mixing; advance: called after each step
    Every place in the batch has samples and random numbers of its own (place c of b: samples c, c + b, c + 2b, ..),
    so that processes which divide the places among them (see parallel.py) draw what a single one draws.
    Raises ValueError if the loss is not finite."""
    levels = {"params": [p for q in quantizers for p in q.level_parameters()], "lr": settings.level_rate}
    mapping = {"params": [p for q in quantizers for p in q.mapping_parameters()], "lr": settings.mapping_rate}
    optimizer = torch.optim.Adam([mapping, levels], fused=True)
    places = range(parallel.rank(), settings.batch_size, parallel.world())
    generators = [torch.Generator().manual_seed(seed * settings.batch_size + place) for place in places]
    n_steps, device = len(target) // len(places), rope[0].device  # of one epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * n_steps)
    for step in range(settings.epochs * n_steps):
        if step % n_steps == 0:
            columns = [torch.randperm(n_steps, generator=g) * len(places) + c for c, g in enumerate(generators)]
            order = torch.stack(columns, dim=1)  # (n_steps, samples of this process in a step)
        if step and step % settings.period == 0:
            for quantizer in quantizers:
                quantizer.remap(settings.local)
        chosen = order[step % n_steps]
        original, quantized = (x[chosen] for x in inputs)
        draws = torch.stack([torch.rand(original.shape[1:], generator=g) for g in generators])
        mixed = torch.where(draws < settings.original_input, original, quantized)
        loss = F.mse_loss(block(mixed.to(device).float(), *rope), target[chosen].to(device).float())
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}")
        loss.backward()
        parallel.average(p.grad for group in optimizer.param_groups for p in group["params"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance()


@torch.inference_mode()
def moves(before: list[Tensor], after: list[Tensor], n_bits: int) -> list[float]:
    """Share of the weights whose level moved by 0, 1, 2, .. places. before, after: by layer, as `ranks` gives them."""
    counts = torch.zeros(2**n_bits, dtype=torch.int64)
    for old, new in zip(before, after):
        moved = torch.maximum(old, new) - torch.minimum(old, new)  # uint8 has no sign
        counts += torch.tensor([int((moved == distance).sum()) for distance in range(2**n_bits)])
    return (counts / counts.sum()).tolist()


def quantize_block(
    checkpoint: Checkpoint, i: int, inputs: tuple[Tensor, Tensor], target: Tensor, rope: tuple[Tensor, Tensor], args,
    settings: Training, bar: tqdm,
) -> tuple[dict[str, BCQLinear], dict]:  # fmt: skip
    """Block i from float to bit-planes. Returns its packed layers and its record, seconds and losses. Raises ValueError
    naming the block.

    inputs: from the original blocks (untouched) and from the quantized ones (replaced by those of the next block)
    target: an empty tensor like them, which takes the original block's output
    args: method, bits, group_size and device are read; bar: moved on by each layer initialized and each step"""
    try:
        return _quantize_block(checkpoint, i, inputs, target, rope, args, settings, bar)
    except ValueError as error:
        raise ValueError(f"model.layers.{i}: {error}") from None


def _quantize_block(checkpoint, i, inputs, target, rope, args, settings, bar):
    start, (original, quantized) = time.time(), inputs
    block = checkpoint.block(i, device=args.device)
    with input_squares(linears(block) if settings.importance else {}) as importance:
        forward(block, original, rope, out=target)
    begun, quantizers, choice = time.time(), {}, (args.method, args.bits, args.group_size)
    for name, quantizer in quantize_layers(checkpoint, block, i, *choice, settings, importance):
        quantizers[name] = quantizer
        bar.update()
    record = {"initializing": time.time() - begun, "training": 0.0}
    record["loss_before"] = output_error(block, quantized, rope, target)
    bar.set_postfix_str(f"loss {record['loss_before']:.3e}")
    if is_trained(args.method):
        seed, before = settings.seed * 100_003 + i, [q.ranks() for q in quantizers.values()]
        begun = time.time()
        train_block(block, list(quantizers.values()), inputs, target, rope, settings, seed, bar.update)
        record["training"] = time.time() - begun
        record["moves"] = moves(before, [q.ranks() for q in quantizers.values()], args.bits)
    packed = pack_layers(block, quantizers)
    for layer in packed.values():
        parallel.agree(layer.state_dict().values())
    record["loss_after"] = output_error(block, quantized, rope, target, replace=True)
    record["seconds"] = time.time() - start
    return packed, record
