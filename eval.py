"""Measure a checkpoint folder, original or packed: perplexity of a text, text from a prompt with tokens per second, or
answers to the questions of MMLU (see mmlu.py).

    python eval.py --model FOLDER --text wiki.test.raw
    python eval.py --model FOLDER --prompt "def fibonacci("
    python eval.py --model FOLDER --mmlu DATA --shots 5

Perplexity by the protocol of the field (Frantar et al. 2022): the text is tokenized whole and cut into windows of
seq_len that do not overlap; each window predicts its own tokens from the second on; the exponential of the mean loss.
It is computed one decoder block at a time over all windows, in float32, so a model of any depth needs the memory of
one block and of the activations.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Callable
from zlib import crc32

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import mmlu
from command import check_device, default_device, guarded
from kernel import BCQLinear
from llama import Block, Checkpoint, rope_tables

TINY = Path(__file__).parent / "models" / "tiny"


def standard_library_text(held_out: bool) -> str:
    """Python's own source, on every machine that runs this: one file in 16, by a hash of its name, is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    names = (p.relative_to(root).as_posix() for p in sorted(root.rglob("*.py")))
    chosen = (n for n in names if not skip & set(n.split("/")) and (crc32(n.encode()) % 16 == 0) == held_out)
    return "\n".join((root / n).read_text("utf-8", errors="replace") for n in chosen)


def read_text(path: str | Path) -> str:
    """A UTF-8 file, whole. Raises OSError or ValueError naming it if it cannot be read or is empty."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise OSError(f"{path}: cannot read this text file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def load_text(path: str | None, held_out: bool) -> tuple[str, str]:
    """A text and its name: the file, or the standard library's training or held-out files if `path` is None."""
    if path is not None:
        return read_text(path), Path(path).name
    return standard_library_text(held_out), "Python standard library" + (", held-out files" if held_out else "")


def load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json` of a checkpoint folder."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # some files ask for a sentence classifier's 128 tokens
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: missing or damaged ({error})") from None


def tokenize(tokenizer: Tokenizer, text: str, name: str, seq_len: int) -> Tensor:
    """(n_tokens,) int64, at least one window. Raises ValueError naming the text if it is shorter."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    if len(ids) < seq_len:
        raise ValueError(
            f"{name}: {len(ids)} tokens are less than one window of {seq_len}; give more text, or a smaller window"
        )
    return ids


def cut(ids: Tensor, seq_len: int) -> Tensor:
    """(n_tokens,) -> (n_windows, seq_len), without overlap; what is left over at the end is dropped."""
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def batches(x: Tensor, tokens: int = 4096) -> tuple[Tensor, ...]:
    """Views of x: (n, seq_len, ...), each of about so many tokens."""
    return x.split(max(1, tokens // x.shape[1]))


@torch.inference_mode()
def perplexity(
    checkpoint: Checkpoint, windows: Tensor, device="cpu", prepare: Callable[[Block, int], None] | None = None, label=""
) -> float:
    """exp of the mean next-token loss.

    windows: (n_windows, seq_len) int64
    prepare: called with each block and its number before it is used, for example to quantize it
    label: what the progress bar calls it"""
    cos, sin = rope_tables(checkpoint.config, windows.shape[1], device)
    x = checkpoint.embed(windows)  # (n_windows, seq_len, hidden_size), stays on the CPU
    for i in tqdm(
        range(checkpoint.config.num_hidden_layers), desc=f"perplexity {label}".strip(), unit="block", leave=False
    ):
        block = checkpoint.block(i, device=device)
        if prepare is not None:
            prepare(block, i)
        for part in batches(x):
            part.copy_(block(part.to(device), cos, sin))
    head, loss = checkpoint.head(device=device), 0.0
    for ids, last in zip(windows, x):
        logits = head(last[:-1].to(device))
        loss += F.cross_entropy(logits, ids[1:].to(device)).item() / len(windows)
    if math.isnan(loss):
        raise ValueError(f"{checkpoint.folder}: the loss is not a number; do config.json and the weights fit together?")
    return math.exp(loss) if loss < 700 else math.inf


def generate(
    checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: str, n_tokens: int, device
) -> tuple[str, float, float]:
    """The prompt greedily continued; tokens per second, the reading of the prompt included; gigabytes of weights read
    in that time, per second.

    Every token reads every weight once. The original runs in float32 on a CPU and in bfloat16 on a GPU; of a packed
    model embedding and head stay bfloat16 on a CPU too."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    context = checkpoint.config.max_position_embeddings
    if n_tokens < 1:
        raise ValueError(f"--tokens {n_tokens}: must be at least 1")
    if ids.shape[1] == 0 or ids.shape[1] + n_tokens > context:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {n_tokens} more do not fit: 1 to {context} in all, see --tokens"
        )
    on_gpu, packed = torch.device(device).type == "cuda", checkpoint.config.quantization is not None
    head_dtype = torch.bfloat16 if on_gpu or packed else torch.float32
    model = checkpoint.model(torch.bfloat16 if on_gpu else torch.float32, device, head_dtype)
    model.generate(ids, 2)  # warm up, the prompt and a single token; compiles the kernels if need be
    start = time.perf_counter()
    text = tokenizer.decode(model.generate(ids, n_tokens)[0].tolist())
    speed = n_tokens / (time.perf_counter() - start)
    read = (model.model.layers, model.model.norm, model.lm_head)
    size = sum(t.nbytes for module in read for t in (*module.parameters(), *module.buffers()))
    return text, speed, size * speed / 1e9


def answer_questions(checkpoint: Checkpoint, tokenizer: Tokenizer, args, seq_len: int, device: torch.device) -> str:
    """MMLU as a table. Raises ValueError or OSError."""
    if args.shots < 0:
        raise ValueError(f"--shots {args.shots}: must be at least 0")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: must be at least 1")
    mmlu.subjects(Path(args.mmlu))  # before the model is loaded
    on_gpu = device.type == "cuda"
    model = checkpoint.model(torch.bfloat16 if on_gpu else torch.float32, device)
    for name, packed in list(model.named_modules()) if not on_gpu else ():
        if isinstance(packed, BCQLinear):  # once, and not again for every question
            linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
            model.set_submodule(name, linear)
    found = mmlu.accuracy(checkpoint, model, tokenizer, Path(args.mmlu), args.shots, seq_len, args.limit)
    return mmlu.table(found)


def resolve_seq_len(asked: int | None, checkpoint: Checkpoint, option: str = "--seq-len") -> int:
    """The window: as asked, else 2048, or the model's context if smaller. Raises ValueError beyond the context."""
    context = checkpoint.config.max_position_embeddings
    if asked is not None and not 2 <= asked <= context:
        raise ValueError(f"{option} {asked}: choose 2 to {context}, the context of this model")
    return asked or min(2048, context)


def run(args: argparse.Namespace) -> None:
    device, checkpoint = check_device(args.device), Checkpoint(args.model)
    tokenizer = load_tokenizer(checkpoint.folder)
    if args.prompt is not None:
        checkpoint.check_ids(torch.tensor(tokenizer.encode(args.prompt).ids))
        text, speed, read = generate(checkpoint, tokenizer, args.prompt, args.tokens, device)
        print(f"{text}\n\n{speed:.1f} tokens/s, {read:.1f} GB/s of weights")
        return
    seq_len = resolve_seq_len(args.seq_len, checkpoint)
    if args.mmlu is not None:
        print(answer_questions(checkpoint, tokenizer, args, seq_len, device))
        return
    text, name = load_text(args.text, held_out=True)
    windows = cut(tokenize(tokenizer, text, name, seq_len), seq_len)
    result = perplexity(checkpoint, windows, device)
    print(f"perplexity {result:.4f} ({name}, seq_len {seq_len}, {len(windows)} windows)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Perplexity of a checkpoint folder (original or packed), text generated by it, or its MMLU score."
    )
    add = parser.add_argument
    add("--model", default=TINY, help="checkpoint folder (default: the bundled models/tiny)")
    add("--text", help="UTF-8 file to measure on (default: the Python standard library, its held-out files)")
    add("--seq-len", type=int, help="tokens per window (default: 2048, or the model's context if smaller)")
    add("--prompt", help="continue this text instead and print tokens/s")
    add("--tokens", type=int, default=100, help="tokens to generate (default: %(default)s)")
    add("--mmlu", help="answer multiple-choice questions instead: the published folder, with dev and test")
    add("--shots", type=int, default=5, help="solved questions shown before each (default: %(default)s)")
    add("--limit", type=int, help="ask only so many of each subject, for a quick look (default: all)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
