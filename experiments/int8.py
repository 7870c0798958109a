"""What rounding to bytes costs a packed model: its perplexity by the best exact path of this CPU
and by its bytes, a few tokens at a time.

    python -m experiments.int8 PACKED wiki.test.joined.txt

32 tokens at a time, with a KV cache, all products are those of the kernels for few tokens; a window at once would be
multiplied by dequantized weights, whatever the path.
"""

import argparse
import math
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernel import paths
from llama import KVCache, Llama, rope_tables
from support.checkpoint import Checkpoint
from support.command import guarded
from support.data import cut, load_tokenizer, read_text, tokenize

TOGETHER = 32


def losses(model: Llama, window: Tensor, path: str) -> Tensor:
    """window: (length,) int64 -> (length - 1,) float64, of each next token."""
    caches = [KVCache(model.config, 1, len(window), model.model.norm.weight) for _ in model.model.layers]
    rope = rope_tables(model.config, len(window))
    with mock.patch("kernel.best_path", return_value=path):
        logits = torch.cat([model(part[None], caches, rope)[0] for part in window.split(TOGETHER)])
    return F.cross_entropy(logits[:-1], window[1:], reduction="none").double()


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    checkpoint, found = Checkpoint(args.packed), paths("cpu")
    model, tokenizer = checkpoint.model(), load_tokenizer(args.packed)
    ids = tokenize(tokenizer, read_text(args.text), str(args.text), args.seq_len)
    windows = cut(ids, args.seq_len)[: args.windows]

    chosen = [path for path in (found[0], f"{found[0]}_int8") if path in found]
    by_path = {path: torch.cat([losses(model, w, path) for w in tqdm(windows, leave=False)]) for path in chosen}
    for path, loss in by_path.items():
        more = loss - by_path[chosen[0]]
        error = more.std() / len(more) ** 0.5
        print(f"{path}: perplexity {math.exp(loss.mean()):.3f}, {100 * more.mean():+.2f} % (standard error ", end="")
        print(f"{100 * error:.2f} %), largest change of a token's loss {more.abs().max():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What rounding to bytes costs the perplexity of a packed model.")
    parser.add_argument("packed", type=Path, help="folder written by calibrate.py")
    parser.add_argument("text", type=Path, help="UTF-8 file")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=2, help="(default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
