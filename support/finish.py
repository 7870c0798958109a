"""The finish: alpha and shift of all layers trained together, against the logits of the original model (ours).

A block is trained to reproduce the original block; the error that remains adds up from block to block. So at the end,
with the codes fixed, all levels of the model are trained end to end, on samples other than the blocks' (like the scales
in EfficientQAT, Chen et al. 2025, but towards the original's logits). The loss is the Kullback-Leibler divergence

    KL = mean over tokens of  sum_v p_v (log p_v - log q_v)      p: the original's probabilities, q: those of the model

In memory are the head and all blocks, with a byte for each weight and 5 (n_bits + 1) floats for each group (parameters,
gradients, two moments, the best so far); in a step, also the input of every block for one sequence and one block's
activations: the forward pass keeps no graph, and the backward pass computes each block once more. The host holds the
final states of the original: 4 bytes for each hidden unit and token of the samples.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eval import run_blocks
from flexbcq import dequantize, packed_layer
from kernel import BCQLinear, from_tiles, unpack
from llama import Block, rope_tables
from support import parallel
from support.checkpoint import Checkpoint, write_json
from support.command import coarse_products, named
from support.resume import REPORT, read_block, write_block
from support.settings import HELD_OUT, Settings

HEAD_TOKENS = 512  # whose logits are in memory at a time
STAGED = "finish"  # folder of the new files, until all are there


class FixedCodesLinear(nn.Module):
    """A packed layer whose levels can be trained while its codes stay.

    codes: (out_features, in_features) uint8
    unit:  (n_groups, 1), the mean |alpha| of each group
    theta: (n_groups, n_bits + 1), alpha and shift in this unit, so that one learning rate suits all groups"""

    def __init__(self, packed: BCQLinear):
        super().__init__()
        out = packed.out_features
        alpha = torch.stack([from_tiles(plane, out) for plane in packed.alpha], dim=-1)  # (out, groups, n_bits)
        theta = torch.cat((alpha, from_tiles(packed.shift, out).unsqueeze(-1)), dim=-1).flatten(0, 1).float()
        unit = theta[:, :-1].abs().mean(1, keepdim=True).clamp(min=1e-8)
        self.register_buffer("codes", unpack(packed.bit_planes, out))
        self.register_buffer("unit", unit)
        self.register_buffer("bias", packed.bias)
        self.theta = nn.Parameter(theta / unit)

    def levels(self) -> tuple[Tensor, Tensor]:
        """alpha (n_groups, n_bits) and shift (n_groups, 1)."""
        theta = self.unit * self.theta
        return theta[:, :-1], theta[:, -1:]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return F.linear(x, dequantize(self.codes, *self.levels()), self.bias)

    @torch.no_grad()
    def pack(self) -> BCQLinear:
        """The layer as it ships."""
        return packed_layer(self.codes, *self.levels(), self.bias)


def swap(block: Block, old: type, new: Callable[[nn.Module], nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Put new(layer) in the place of every layer of type `old`; yields the new ones with their names."""
    for name, module in list(block.named_modules()):
        if isinstance(module, old):
            block.set_submodule(name, new(module))
            yield name, block.get_submodule(name)


# ------------------------------------------------------------------------------------------------------------ one step


def inputs_and_output(blocks: list[Block], x: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The input of every block, and the output of the last. x: (batch, seq_len, hidden_size)."""
    states = [x]
    with torch.no_grad():
        for block in blocks:
            states.append(block(states[-1], *rope))
    return states


def divergence(head: nn.Module, x: Tensor, original: Tensor) -> Iterator[Tensor]:
    """The KL above, in parts that add up to it, without the first token, which has no context.

    x, original: (seq_len, hidden_size), what the head gets"""
    for part, wanted in zip(x[1:].split(HEAD_TOKENS), original[1:].split(HEAD_TOKENS)):
        log_q, log_p = head(part).log_softmax(-1), head(wanted).log_softmax(-1)
        yield F.kl_div(log_q, log_p, log_target=True, reduction="sum") / (len(x) - 1)


def step(blocks: list[Block], head: nn.Module, x: Tensor, original: Tensor, rope: tuple[Tensor, Tensor]) -> None:
    """Add the gradient of the divergence to every theta.

    x: (1, seq_len, hidden_size), embeddings; original: (seq_len, hidden_size), what the head of the original gets"""
    *inputs, last = inputs_and_output(blocks, x, rope)

    # the head leaves its gradient at the end of the last block
    last.requires_grad_()
    for part in divergence(head, last[0], original):
        part.backward()

    # from the last block to the first: compute it again, this time with a graph, and pass the gradient on
    gradient = last.grad
    for block, state in zip(reversed(blocks), reversed(inputs)):
        state.requires_grad_()
        block(state, *rope).backward(gradient)
        gradient = state.grad


@torch.no_grad()
def mean_divergence(
    blocks: list[Block], head: nn.Module, x: Tensor, original: Tensor, rope: tuple[Tensor, Tensor]
) -> float:
    """The divergence, averaged over samples. x, original: (samples, seq_len, hidden_size), on the host."""
    loss, device = 0.0, rope[0].device
    for embedded, wanted in zip(x, original):
        last = inputs_and_output(blocks, embedded[None].to(device), rope)[-1][0]
        loss += sum(part.item() for part in divergence(head, last, wanted.to(device)))
    return loss / len(x)


# --------------------------------------------------------------------------------------------------------- all of them


def train_levels(
    checkpoint: Checkpoint, blocks: list[Block], samples: Tensor, held_out: Tensor, settings: Settings
) -> list[float]:
    """Adam on the divergence; its rate rises over the first eighth of the steps and falls to 0 as a cosine. Changes the
    packed layers of `blocks` in place.

    checkpoint: the original; blocks: all of the quantized model, on the device
    samples, held_out: (samples, seq_len) int64, the shares of this process; a step takes its share of --batch-size, in
    order
    Of the states at the start and after each quarter of the steps, the best on held_out is kept: never worse than
    before, but for the rounding to fp16. Returns the divergences of all these states."""
    device = settings.device
    rope, head = rope_tables(checkpoint.config, samples.shape[1], device), checkpoint.head(device=device)
    ids, sizes = torch.cat((held_out, samples)), (len(held_out), len(samples))
    table = checkpoint.embedding(None)  # in its dtype; rows become float32 when they are looked up
    x_held_out = table(held_out).float()
    target_held_out, target = run_blocks(checkpoint, ids, device, label="original").split(sizes)

    thetas = [layer.theta for block in blocks for _, layer in swap(block, BCQLinear, FixedCodesLinear)]
    optimizer = torch.optim.Adam(thetas, lr=settings.finish_rate, betas=(0.9, 0.95), fused=True)
    n, n_places = settings.finish_steps, settings.batch_size // parallel.world()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) * 8 / n) * (1 + math.cos(math.pi * t / n)) / 2
    )

    def measure() -> float:
        return parallel.mean(mean_divergence(blocks, head, x_held_out, target_held_out, rope))

    losses, best = [measure()], [theta.detach().clone() for theta in thetas]
    for t in (bar := tqdm(range(n), desc="finish", unit="step")):
        for place in range(n_places):
            i = (t * n_places + place) % len(samples)
            with coarse_products(device):
                step(blocks, head, table(samples[i : i + 1]).float().to(device), target[i].to(device), rope)
        for theta in thetas:
            theta.grad /= n_places
        parallel.average(theta.grad for theta in thetas)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        # at the end of each quarter: is this the best state so far? (a loss of NaN is not)
        if (t + 1) * 4 // n > t * 4 // n:
            losses.append(measure())
            bar.set_postfix_str(f"divergence {losses[0]:.4f} -> {losses[-1]:.4f}")
            if losses[-1] < min(losses[:-1]):
                for kept, theta in zip(best, thetas):
                    kept.copy_(theta.detach())

    with torch.no_grad():
        for theta, kept in zip(thetas, best):
            theta.copy_(kept)
    return losses


def finish(checkpoint: Checkpoint, ids: Tensor, settings: Settings, folder: Path, report: dict) -> None:
    """Read all blocks back, train their levels, and write them again, unless the report says that it was done.

    ids: (HELD_OUT + samples, seq_len); the new files replace the old ones only when all are there, so that a run killed
    at any moment resumes from the blocks, or from the finished result"""
    staged, start = folder / STAGED, time.perf_counter()
    parallel.wait()  # the first process writes the last block while the others are here already
    if "finish" not in report:
        blocks = []
        for i in range(checkpoint.config.num_hidden_layers):
            blocks.append(checkpoint.block(i, device=settings.device))
            for name, layer in read_block(checkpoint, i, folder, settings).items():
                blocks[i].set_submodule(name, layer.to(settings.device))
        held_out, samples = ids[:HELD_OUT], parallel.share(ids[HELD_OUT:])
        if HELD_OUT % parallel.world() == 0:
            held_out = parallel.share(held_out)
        losses = train_levels(checkpoint, blocks, samples, held_out, settings)

        if parallel.rank() == 0:
            staged.mkdir(exist_ok=True)
            for i, block in enumerate(blocks):
                with named(f"model.layers.{i}"):
                    write_block(checkpoint, i, dict(swap(block, FixedCodesLinear, FixedCodesLinear.pack)), staged)
        report["finish"] = {"divergence": losses, "seconds": time.perf_counter() - start}

    if parallel.rank() == 0:
        write_json(folder / REPORT, report)
        for file in sorted(staged.glob("*.safetensors")):
            file.replace(folder / file.name)
        shutil.rmtree(staged, ignore_errors=True)


def leave_out(folder: Path, report: dict) -> None:
    """Note that there is no finish, for lack of memory, so that a resumed run does not begin one later."""
    report["finish"] = None
    if parallel.rank() == 0:
        write_json(folder / REPORT, report)
        shutil.rmtree(folder / STAGED, ignore_errors=True)  # of a run that was killed in it
