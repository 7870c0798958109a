"""Texts and tokens: the text to calibrate on, the text to evaluate on, cut into windows."""

import sysconfig
from pathlib import Path
from zlib import crc32

import torch
from tokenizers import Tokenizer
from torch import Tensor

from support.checkpoint import Checkpoint
from support.settings import Settings


def standard_library_text(held_out: bool) -> str:
    """Python's own source, on every machine that runs this: one file in 16, by a hash of its name, is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        is_held_out = crc32(name.encode()) % 16 == 0
        if is_held_out == held_out and not skip & set(name.split("/")):
            texts.append(path.read_text("utf-8", errors="replace"))
    return "\n".join(texts)


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


def load_text(path: Path | None, held_out: bool) -> tuple[str, str]:
    """A text and its name: the file, or the standard library's training or held-out files if `path` is None."""
    if path is not None:
        return read_text(path), Path(path).name
    return standard_library_text(held_out), "Python standard library" + (", held-out files" if held_out else "")


def load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json` of a checkpoint folder. Raises ValueError if it is missing or damaged."""
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
    """(n_tokens,) -> (n_windows, seq_len), without overlap; what is left over at the end is dropped.

    >>> cut(torch.arange(7), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])"""
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def batches(x: Tensor, tokens: int = 4096) -> tuple[Tensor, ...]:
    """Views of x: (n, seq_len, ...), each of about this many tokens."""
    return x.split(max(1, tokens // x.shape[1]))


def resolve_seq_len(asked: int | None, checkpoint: Checkpoint, option: str = "--seq-len") -> int:
    """The window: as asked, else 2048, or the model's context if smaller. Raises ValueError beyond the context."""
    context = checkpoint.config.max_position_embeddings
    if asked is not None and not 2 <= asked <= context:
        raise ValueError(f"{option} {asked}: choose 2 to {context}, the context of this model")
    return asked or min(2048, context)


def load_texts(checkpoint: Checkpoint, settings: Settings) -> tuple[Tensor, Tensor, str]:
    """Calibration samples (samples, seq_len), evaluation windows (n_windows, eval_seq_len) and the name of their text.

    Samples start at random places. Without an evaluation text the last tenth of the calibration text is kept for
    evaluation; of the standard library it is every sixth window of the held-out files."""
    tokenizer = load_tokenizer(checkpoint.folder)
    seq_len, eval_seq_len = settings.seq_len, settings.eval_seq_len

    text, name = load_text(settings.text, held_out=False)
    if settings.text and not settings.eval_text:
        split = len(text) * 9 // 10
        text, eval_text, eval_name = text[:split], text[split:], f"last tenth of {name}"
    else:
        eval_text, eval_name = load_text(settings.eval_text, held_out=True)

    ids = tokenize(tokenizer, text, name, seq_len)
    generator = torch.Generator().manual_seed(settings.seed)
    starts = torch.randint(len(ids) - seq_len + 1, (settings.samples,), generator=generator).tolist()
    samples = torch.stack([ids[start : start + seq_len] for start in starts])

    windows = cut(tokenize(tokenizer, eval_text, eval_name, eval_seq_len), eval_seq_len)
    if not settings.text and not settings.eval_text:
        windows = windows[::6]
    return samples, windows[: settings.eval_windows], eval_name
