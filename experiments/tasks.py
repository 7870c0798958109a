"""Answers of a model in the tasks of RESULTS.md, and its distance from the original.

    python -m experiments.tasks --model PACKED --against smollm2 --text wiki.test.joined.txt --data DATA --out FILE

DATA holds the files that page.TASKS names. Each answer is kept, so that models can be compared item by item.
"""

import argparse
from pathlib import Path

import torch

from eval import compare
from experiments import page
from support.checkpoint import Checkpoint, write_json
from support.cloze import answers, read_items
from support.command import check_device, default_device, guarded
from support.data import cut, load_tokenizer, read_text, resolve_seq_len, tokenize
from support.tasks import load_model


def measure(folder: Path, original: Path | None, text: Path, data: Path, device: torch.device) -> dict:
    """By task a string with 1 for each item answered right, else 0; divergence and agreement on the first windows."""
    checkpoint, tokenizer = Checkpoint(folder), load_tokenizer(folder)
    model, record = load_model(checkpoint, device), {}
    for name, (path, limit) in page.TASKS.items():
        items = read_items(data / path, limit)
        record[name] = "".join(str(int(right)) for right, *_ in answers(checkpoint, model, tokenizer, items))

    if original is not None:
        del model  # `compare` reads one block at a time
        seq_len = resolve_seq_len(None, checkpoint)
        windows = cut(tokenize(tokenizer, read_text(text), text.name, seq_len), seq_len)[: page.WINDOWS]
        found = compare(checkpoint, Checkpoint(original), windows, device)
        record |= {"kl_mean": found.kl_mean, "same_token": found.same_token}
    return record


def run(args: argparse.Namespace) -> None:
    write_json(args.out, measure(args.model, args.against, args.text, args.data, check_device(args.device)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the tasks of RESULTS.md, and compare with the original.")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder, original or packed")
    add("--against", type=Path, help="the original of a packed model")
    add("--text", type=Path, required=True, help="file for the comparison")
    add("--data", type=Path, required=True, help="folder with " + ", ".join(path for path, _ in page.TASKS.values()))
    add("--out", type=Path, required=True, help="file to write")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
