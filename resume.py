"""A calibration may be killed at any moment; the same command goes on where it was.

    with resumable(out, settings, source, texts) as (folder, report):
        for i in range(len(report["blocks"]), n_blocks):
            ...                                    # quantize block i and write it into `folder`
            report["blocks"].append(record)
            write_json(folder / REPORT, report)    # from here on block i is finished

`folder` is OUT.partial and becomes OUT at the end. Every file in it appears whole or not at all (`llama.whole_file`),
and a block's record is written after its weights, so calibration.json never claims too much. Whatever was not
finished is done again from the seeds of its block, which gives the bytes of a run that was never interrupted.
"""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

import parallel
from kernel import BCQLinear
from llama import Block, Checkpoint, linears, open_tensors
from llama import sync, write_config, write_index, write_json, write_tensors

REPORT = "calibration.json"


def fingerprints(source: Checkpoint, texts: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of config.json and of every byte of the weights (two minutes for 140 GB), and of the tokens of texts,
    with their shape."""
    found = {}
    for path in (source.folder / "config.json", *source.shards()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    for name, ids in texts.items():
        digest = hashlib.sha256(ids.contiguous().numpy()).hexdigest()[:16]
        found[name] = f"{' x '.join(map(str, ids.shape))} tokens {digest}"
    return found


def read_report(partial: Path, begun: dict) -> dict:
    """The report in the folder `partial`, or a new one. Raises ValueError naming what the earlier run had otherwise."""
    start_again = f"delete {partial} to start again"
    if not (partial / REPORT).exists():
        if any(path.suffix != ".tmp" for path in partial.iterdir()):
            raise ValueError(f"{partial}: exists but holds no {REPORT}; is it yours? Otherwise {start_again}")
        return begun | {"perplexity": {}, "blocks": []}
    try:
        report = json.loads((partial / REPORT).read_bytes())
        len(report["blocks"]), len(report["perplexity"])  # are they there?
        pairs = [(key, report[part].get(key), now) for part in begun for key, now in begun[part].items()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{partial / REPORT}: damaged ({error!r}); {start_again}") from None
    for key, before, now in pairs:
        if before != now:
            raise ValueError(
                f"{partial}: was begun with {key} {before}, now it is {now}; "
                f"go on with the same options and files, or {start_again}"
            )
    return report


@contextmanager
def resumable(out: Path, settings: dict, source: Checkpoint, texts: dict[str, Tensor]) -> Iterator[tuple[Path, dict]]:
    """Yield OUT.partial and its report; at the end the folder takes the name OUT.

    settings, the files of `source` and the texts decide the result: an earlier run is only gone on with if
    it had the same. On an error the finished blocks are kept, and the error says so; without any, nothing is left.
    Raises OSError if another process works there, ValueError if the folder is of another run."""
    partial = out.with_name(out.name + ".partial")
    if parallel.rank():  # reads what process 0 has written
        parallel.wait()
        yield partial, json.loads((partial / REPORT).read_bytes())
        return
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise OSError(f"{partial}: another process is at work there; wait for it, or give another --out") from None
        report = read_report(partial, {"settings": settings, "inputs": fingerprints(source, texts)})
        try:
            write_json(partial / REPORT, report)
            parallel.wait()
            yield partial, report
            partial.rename(out)  # over an empty folder if there is one
            sync(out.parent)
        except BaseException as error:
            path = partial / REPORT  # what the disk says counts
            if n := len(json.loads(path.read_bytes())["blocks"]) if path.exists() else 0:
                error.add_note(f"{partial} keeps {n} finished block{'s'[: n > 1]}: the same command goes on from there")
            else:
                shutil.rmtree(partial, ignore_errors=True)  # it may have its last name already
            raise
    finally:
        os.close(lock)


# -------------------------------------------------------------------------------------------------- the weight files


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
