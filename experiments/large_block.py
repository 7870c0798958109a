"""Write a Llama with the dimensions of a large one, but few blocks, and random weights: what does a block take?

    python -m experiments.large_block 8B FOLDER
    python calibrate.py --model FOLDER --group-size 128 --dry-run

The tokenizer is the bundled model's; the vocabulary is as large as that of Llama 3.
"""

import argparse
import json
from pathlib import Path

import torch

from llama import Llama
from support.checkpoint import read_config, write_config, write_tensors
from support.command import guarded
from support.settings import TINY

SIZES = {"8B": (4096, 14336, 32), "70B": (8192, 28672, 64)}  # hidden_size, intermediate_size, heads of Llama 3


def run(args: argparse.Namespace) -> None:
    hidden_size, intermediate_size, heads = SIZES[args.size]
    raw = json.loads((TINY / "config.json").read_text("utf-8"))
    raw |= {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": args.blocks}
    raw |= {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0}
    raw |= {"max_position_embeddings": 8192, "tie_word_embeddings": False}
    with torch.device("meta"):
        model = Llama(read_config(raw))
    args.folder.mkdir()
    tensors = {}
    for name, t in model.state_dict().items():
        random = torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02)
        tensors[name] = torch.ones_like(random) if name.endswith("norm.weight") else random
    write_tensors(args.folder / "model.safetensors", tensors)
    write_config(args.folder, raw, TINY)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama of large dimensions with random weights.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--blocks", type=int, default=1, help="(default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
