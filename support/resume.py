"""A calibration may be killed at any moment; the same command resumes it.

    with resumable(settings, source, texts) as (folder, report):
        for i in range(len(report["blocks"]), n_blocks):
            ...                                    # quantize block i and write it into `folder`
            report["blocks"].append(record)
            write_json(folder / REPORT, report)    # from here on block i is finished

`folder` is OUT.partial and becomes OUT at the end. Every file in it appears whole or not at all
(`checkpoint.whole_file`), and a block's record is written after its weights, so calibration.json never claims too much.
What was not finished is redone from the seeds of its block, which gives the same bytes as a run that was never
interrupted.
"""

import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from flexbcq import initialize, nearest, packed_layer
from kernel import BCQLinear
from llama import Block, linears
from support import parallel
from support.checkpoint import (
    Checkpoint,
    open_tensors,
    sync_folder,
    write_config,
    write_index,
    write_json,
    write_tensors,
)
from support.settings import Settings

REPORT, LOCK = "calibration.json", "lock"
HEAD_ROWS = 4096  # of embedding and lm_head, quantized at a time


def partial_folder(out: Path) -> Path:
    """Where a run lives until it is finished."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path) -> None:
    """Raises OSError if the finished folder could not take this name."""
    if out.name in ("", ".."):
        raise OSError(f"--out {out}: give the name of a new folder")
    if out.exists() and not is_empty_folder(out):
        raise OSError(f"--out {out}: exists and is no empty folder; delete it or choose another")
    if out.is_symlink() or out.is_mount():
        raise OSError(f"--out {out}: is a link or a mount point; give the name of a new folder")
    if parallel.rank() == 0 and (partial_folder(out) / LOCK).exists():
        with locked(partial_folder(out)):  # is another process at work there?
            pass


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def fingerprints(source: Checkpoint, texts: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of config.json, of every byte of the weights (two minutes for 140 GB) and of the tokens of the texts,
    those with their shape."""
    found = {}
    for path in (source.folder / "config.json", *source.shards()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    for name, ids in texts.items():
        digest = hashlib.sha256(ids.contiguous().numpy()).hexdigest()[:16]
        found[name] = f"{' x '.join(map(str, ids.shape))} tokens {digest}"
    return found


def read_report(partial: Path, started: dict) -> dict:
    """The report in the folder `partial`, or a new one that says how the run was started.

    Raises ValueError naming the first setting that differs from the earlier run."""
    start_again = f"delete {partial} to start again"
    if not (partial / REPORT).exists():
        if any(path.name not in (LOCK, f"{REPORT}.tmp") for path in partial.iterdir()):
            raise ValueError(f"{partial}: holds no {REPORT}, so it is no run; give another --out, or delete it")
        return started | {"perplexity": {}, "blocks": []}

    try:
        report = json.loads((partial / REPORT).read_bytes())
        len(report["blocks"]), len(report["perplexity"])  # are they there?
        pairs = [(key, report[part].get(key), now) for part in started for key, now in started[part].items()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{partial / REPORT}: damaged ({error!r}); {start_again}") from None

    for key, before, now in pairs:
        if before != now:
            raise ValueError(
                f"{partial}: was started with {key} {before}, not {now}; "
                f"repeat the original options and files, or {start_again}"
            )
    return report


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out. The lock ends with the process, however that ends. Raises OSError if one is at work."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OSError(f"{folder}: another process is at work there; wait for it, or give another --out") from None
    except (NotImplementedError, OSError) as error:
        print(f"{folder}: cannot be locked ({error}); start only one run with this --out")
    try:
        yield
    finally:
        lock.release()
        (folder / LOCK).unlink(missing_ok=True)


@contextmanager
def resumable(settings: Settings, source: Checkpoint, texts: dict[str, Tensor]) -> Iterator[tuple[Path, dict]]:
    """Yield OUT.partial and its report; at the end the folder takes the name OUT.

    The decisive settings, the files of `source` and the texts decide the result: a run is resumed only if these are
    unchanged. On an error the finished blocks are kept, and the error says so; without any, nothing is left. Raises
    OSError if another process works there, ValueError if the folder belongs to another run."""
    partial = partial_folder(settings.out)
    if parallel.rank():
        yield partial, parallel.agree_on(None)
        return

    partial.mkdir(exist_ok=True)
    with locked(partial):
        report = read_report(partial, {"settings": settings.decisive(), "inputs": fingerprints(source, texts)})
        with finished_blocks_kept(partial):
            write_json(partial / REPORT, report)
            yield partial, parallel.agree_on(report)

    # rename the folder only now that nothing in it is open
    if settings.out.exists():
        settings.out.rmdir()  # it is empty
    partial.rename(settings.out)
    sync_folder(settings.out.parent)


@contextmanager
def finished_blocks_kept(partial: Path) -> Iterator[None]:
    """On an error, say how many blocks are kept and how to resume; if there are none, leave nothing behind."""
    try:
        yield
    except BaseException as error:
        path = partial / REPORT  # what the disk says counts
        n = len(json.loads(path.read_bytes())["blocks"]) if path.exists() else 0
        if n:
            kept = f"{partial} keeps {n} finished {'block' if n == 1 else 'blocks'}"
            # the same command would meet the same ValueError
            error.add_note(kept if isinstance(error, ValueError) else f"{kept}: the same command resumes there")
        else:
            shutil.rmtree(partial, ignore_errors=True)
        raise


# -------------------------------------------------------------------------------------------------- the weight files


def shard(checkpoint: Checkpoint, i: int, folder: Path) -> Path:
    """The file of block i; the one after the last block holds the rest."""
    return folder / f"model-{i + 1:05d}-of-{checkpoint.config.num_hidden_layers + 1:05d}.safetensors"


def write_block(checkpoint: Checkpoint, i: int, packed: dict[str, BCQLinear], folder: Path, dequantized=False) -> None:
    """Block i as a shard: bit-planes, or the weights they stand for, and norms and biases as they were."""
    prefix = f"model.layers.{i}."
    tensors = checkpoint.tensors(lambda name: name.startswith(prefix))
    for name, layer in packed.items():
        weight = tensors.pop(f"{prefix}{name}.weight")
        stored = {"weight": layer.dequantize(weight.dtype)} if dequantized else dict(layer.named_buffers())
        tensors |= {f"{prefix}{name}.{key}": t for key, t in stored.items()}  # a bias is there already
    write_tensors(shard(checkpoint, i, folder), tensors)


def read_block(checkpoint: Checkpoint, i: int, folder: Path, settings: Settings) -> dict[str, BCQLinear]:
    """The packed layers of block i from its shard; none if it was dequantized already."""
    with torch.device("meta"):
        block = Block(checkpoint.config)

    packed = {}
    remedy = f"delete {folder} to start again"
    with open_tensors(shard(checkpoint, i, folder), remedy) as file:
        for name, linear in linears(block).items():
            prefix = f"model.layers.{i}.{name}."
            if f"{prefix}bit_planes" in file.keys():
                has_bias = linear.bias is not None
                layer = BCQLinear(linear.in_features, linear.out_features, settings.bits, settings.group_size, has_bias)
                layer.load_state_dict({key: file.get_tensor(prefix + key) for key in layer.state_dict()})
                packed[name] = layer
    return packed


def dequantize_blocks(checkpoint: Checkpoint, folder: Path, settings: Settings) -> None:
    """Replace the bit-planes of every shard by ordinary weights. Only when all blocks are finished: resuming an
    unfinished calibration takes the planes."""
    for i in range(checkpoint.config.num_hidden_layers):
        if packed := read_block(checkpoint, i, folder, settings):
            write_block(checkpoint, i, packed, folder, dequantized=True)


def quantized_head(weight: Tensor, settings: Settings) -> dict[str, Tensor]:
    """The tensors stored for embedding or lm_head: bit-planes with the levels of rtn, or the weight they stand for.

    weight: (vocab_size, hidden_size)"""
    found = []
    for rows in weight.to(settings.device).split(HEAD_ROWS):
        w = rows.float()  # a row is a group: at 8 bits smaller, and nearer to the weight, than 7 bits in groups of 64
        scale, zero_point, alpha, shift = initialize(w, settings.head_bits, n_ratios=1, n_rounds=0)
        codes = nearest(w / scale + zero_point, alpha, shift)
        layer = packed_layer(codes, scale * alpha, scale * (shift - zero_point), bias=None)
        stored = {"weight": layer.dequantize(weight.dtype)} if settings.dequantized else layer.named_buffers()
        found.append(dict(stored))

    # rows lie along the first dimension, behind that of the planes
    dimension = {"bit_planes": 1, "alpha": 1}
    return {key: torch.cat([part[key] for part in found], dimension.get(key, 0)).cpu() for key in found[0]}


def write_rest(checkpoint: Checkpoint, folder: Path, settings: Settings, quantization: dict | None) -> None:
    """Embedding and head, quantized if that is wanted, the norm as it was, the index of all shards, config.json and the
    tokenizer."""
    rest = checkpoint.tensors(lambda name: not name.startswith("model.layers."))
    for name in checkpoint.head_names if settings.head_bits else ():
        stored = quantized_head(rest.pop(f"{name}.weight"), settings)
        rest |= {f"{name}.{key}": t for key, t in stored.items()}
    write_tensors(shard(checkpoint, checkpoint.config.num_hidden_layers, folder), rest)
    write_index(folder)
    config = checkpoint.raw_config | ({"quantization_config": quantization} if quantization else {})
    write_config(folder, config, checkpoint.folder)
