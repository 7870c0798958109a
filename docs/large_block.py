"""Write a Llama with the dimensions of a large one, few blocks, and random weights: what do its blocks take?

python -m docs.large_block 8B FOLDER                # from the project's root
python calibrate.py --model FOLDER --group-size 128 --dry-run
"""

import argparse
import json
from pathlib import Path

import torch

from eval import TINY
from llama import Llama, LlamaConfig, write_config, write_tensors

SIZES = {  # of Llama 3
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama of large dimensions with random weights.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--blocks", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    raw = json.loads((TINY / "config.json").read_text("utf-8")) | SIZES[args.size]
    raw |= {"head_dim": 128, "num_hidden_layers": args.blocks, "max_position_embeddings": 8192}
    raw["tie_word_embeddings"] = False
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(raw))
    tensors = {}
    for name, t in model.state_dict().items():
        random = torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02)
        tensors[name] = torch.ones_like(random) if name.endswith("norm.weight") else random
    args.folder.mkdir()
    write_tensors(args.folder / "model.safetensors", tensors)
    write_config(args.folder, raw, TINY)


if __name__ == "__main__":
    main()
