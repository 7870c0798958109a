"""Texts, tokens, activations: the text to calibrate on, the text to evaluate on, and where activations are kept."""

import math
import os
import sysconfig
import tempfile
from pathlib import Path
from zlib import crc32

import torch
from tokenizers import Tokenizer
from torch import Tensor

from support.checkpoint import Checkpoint
from support.hub import TEXTS, named_text
from support.settings import HELD_OUT, Settings


def standard_library_text(held_out: bool) -> str:
    """The standard library's source, found wherever Python runs; one file in 16, by a hash of its name, is held out."""
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
    """A UTF-8 file, whole, as Python's `open` gives it: any line ends become \\n, a byte order mark is dropped.

    Raises OSError or ValueError naming the file if it cannot be read or is empty."""
    try:
        text = Path(path).read_text("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise OSError(f"{path}: cannot read this text file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        if error.object.startswith((b"\x1f\x8b", b"PK\x03\x04")):
            raise ValueError(f"{path}: is compressed; unpack it first") from None
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; if it is a text, convert it with iconv") from None
    if "\0" in text:
        raise ValueError(f"{path}: holds NUL bytes; if it is a text, in UTF-16, convert it with iconv")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty" + (" but for blanks" if text else ""))
    return text


def is_named(path: Path | None) -> bool:
    """Whether this is a text of `hub.TEXTS`; a file of that name wins."""
    return str(path) in TEXTS and not path.is_file()


def load_text(path: Path | None, held_out: bool) -> tuple[str, str]:
    """A text and its name: the file, a text of `hub.TEXTS`, or the standard library's training or held-out files if
    `path` is None."""
    if is_named(path):
        held_out_split = "test" if str(path) == "wikitext2" else "validation"
        return named_text(str(path), held_out), f"{path}, {held_out_split if held_out else 'training'} split"
    if path is not None:
        return read_text(path), Path(path).name
    return standard_library_text(held_out), "Python standard library" + (", held-out files" if held_out else "")


def load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json` of a checkpoint folder. Raises ValueError if it is missing or damaged."""
    path = folder / "tokenizer.json"
    if (folder / "tokenizer.model").exists() and not path.exists():
        raise ValueError(
            f"{path}: missing, there is only tokenizer.model; transformers converts it: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: missing or damaged, or too new for the installed tokenizers ({error})") from None

    # some files cut texts to a sentence classifier's 128 tokens, or give other tokens every time
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


PIECE, OVERLAP = 2**18, 2**12  # characters


def encode(tokenizer: Tokenizer, text: str, piece: int = PIECE) -> Tensor:
    """The tokens of a text, (n_tokens,) int64, encoded a piece at a time: an encoding takes some 200 bytes a character.

    Neighbouring pieces overlap and are joined in the middle of the overlap, where both must have the same tokens; if
    they do not, because a token depends on what is far away, the text is encoded whole."""
    if len(text) <= piece:
        return torch.tensor(tokenizer.encode(text).ids)

    joined = []  # (place in the text, token), without what a template adds
    for start in range(0, len(text), piece):
        begin = max(0, start - OVERLAP)
        encoding = tokenizer.encode(text[begin : start + piece], add_special_tokens=False)
        places = torch.tensor([first for first, _ in encoding.offsets]) + begin
        part = torch.stack((places, torch.tensor(encoding.ids)))

        if joined:
            low, middle, high = (start - OVERLAP * share // 4 for share in (3, 2, 1))
            before = joined[-1]
            same = [t[:, (t[0] >= low) & (t[0] < high)] for t in (before, part)]
            if not torch.equal(*same):
                return torch.tensor(tokenizer.encode(text).ids)
            joined[-1] = before[:, before[0] < middle]
            part = part[:, part[0] >= middle]
        joined.append(part)

    # what a template adds at the beginning and at the end, as it does to a short text
    short = tokenizer.encode(text[:OVERLAP])
    n_first = short.special_tokens_mask.index(0)
    n_last = short.special_tokens_mask[::-1].index(0)
    first, last = short.ids[:n_first], short.ids[len(short.ids) - n_last :]
    return torch.cat((torch.tensor(first), *(ids for _, ids in joined), torch.tensor(last))).long()


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text to be continued: without the end-of-text tokens that a template may append."""
    encoding = tokenizer.encode(text)
    n_last = (encoding.special_tokens_mask[::-1] + [0]).index(0)
    return encoding.ids[: len(encoding) - n_last]


def tokenize(tokenizer: Tokenizer, text: str, name: str, seq_len: int) -> Tensor:
    """(n_tokens,) int64, at least one window. Raises ValueError naming the text if it is shorter."""
    ids = encode(tokenizer, text)
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
    seq_len = min(2048, context) if asked is None else asked
    if not 2 <= seq_len <= context:
        raise ValueError(f"{option} {seq_len}: choose 2 to {context}, the context of this model or its sliding window")
    return seq_len


def load_texts(checkpoint: Checkpoint, settings: Settings) -> tuple[Tensor, Tensor, Tensor, str]:
    """Calibration samples (samples, seq_len), others for the finish (HELD_OUT + finish_steps * batch_size, seq_len),
    evaluation windows (n_windows, eval_seq_len) and the name of their text. Without a finish there are no others.

    Samples start at random places. Without an evaluation text, perplexity is measured on the test or validation split
    of a text by name, on the last tenth of a file (not calibrated on), or on every sixth window of the held-out files
    of the standard library."""
    tokenizer = load_tokenizer(checkpoint.folder)
    seq_len, eval_seq_len = settings.seq_len, settings.eval_seq_len

    text, name = load_text(settings.text, held_out=False)
    if is_named(settings.text) and not settings.eval_text:
        eval_text, eval_name = load_text(settings.text, held_out=True)
    elif settings.text and not settings.eval_text:
        split = len(text) * 9 // 10
        text, eval_text, eval_name = text[:split], text[split:], f"last tenth of {name}"
    else:
        eval_text, eval_name = load_text(settings.eval_text, held_out=True)

    ids = tokenize(tokenizer, text, name, seq_len)
    generator = torch.Generator().manual_seed(settings.seed)
    n_finish = settings.finish_steps and HELD_OUT + settings.finish_steps * settings.batch_size
    starts = torch.randint(len(ids) - seq_len + 1, (settings.samples + n_finish,), generator=generator).tolist()
    drawn = torch.stack([ids[start : start + seq_len] for start in starts])

    windows = cut(tokenize(tokenizer, eval_text, eval_name, eval_seq_len), eval_seq_len)
    if not settings.text and not settings.eval_text:
        windows = windows[::6]
    return drawn[: settings.samples], drawn[settings.samples :], windows[: settings.eval_windows], eval_name


def empty_activations(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    """An empty bf16 tensor, in memory or in a file of `folder`. Raises OSError if the disk is full.

    The file loses its name at once and its space when the process ends, however it ends: nothing is left behind."""
    if folder is None:
        return torch.empty(shape, dtype=torch.bfloat16)

    size = math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # all of it now: a write to a mapped file has no way to say "disk full"
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 2 * size)
            else:
                for start in range(0, 2 * size, 2**20):
                    file.write(bytes(min(2**20, 2 * size - start)))
                file.flush()
        except OSError as error:
            raise OSError(f"--offload {folder}: {2 * size / 1e9:.3f} GB do not fit ({error.strerror})") from None
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16).view(shape)
