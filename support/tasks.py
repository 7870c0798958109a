"""MMLU: multiple-choice questions from 57 subjects (Hendrycks et al. 2021), asked as in the original evaluation.

    python eval.py --model FOLDER --mmlu DATA --shots 5

DATA holds the published files, `test/SUBJECT_test.csv` and `dev/SUBJECT_dev.csv`, with lines of question, A, B, C, D,
letter. A prompt shows some solved questions of the subject (the shots, from dev) and then the one to be answered; the
answer is the letter with the highest logit after "Answer:". Shots are dropped until the prompt fits.
"""

import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from kernel import BCQLinear
from llama import KVCache, Llama
from support.checkpoint import Checkpoint

LETTERS = "ABCD"


# --------------------------------------------------------------------------------------------------------- the files


def read_questions(path: Path) -> list[list[str]]:
    """The lines of a file: [question, A, B, C, D, letter]. Raises OSError or ValueError naming file and question."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise OSError(f"{path}: cannot read the questions ({error.strerror}); is it the published folder?") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error}); is it the published file?") from None

    if not rows:
        raise ValueError(f"{path}: holds no questions; is it the published file?")
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in list(LETTERS):
            raise ValueError(f"{path}: question {number} is not question, A, B, C, D, letter")
    return rows


def subjects(folder: Path) -> list[str]:
    """The names of the subjects, in order. Raises OSError if there are none."""
    names = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not names:
        raise OSError(f"{folder}: has no test/SUBJECT_test.csv; is it the published folder?")
    return names


# ------------------------------------------------------------------------------------------------------- the prompts


def prompt(subject: str, shots: list[list[str]], question: list[str]) -> str:
    """What the model is to continue with a letter. The original has two spaces before the subject, and so have we."""
    text = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
    for row in (*shots, question):
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5]))
        text += f"{row[0]}{choices}\nAnswer:" + (f" {row[5]}\n\n" if row is not question else "")
    return text


def prompt_ids(tokenizer: Tokenizer, subject: str, shots: list[list[str]], question: list[str], seq_len: int) -> Tensor:
    """The prompt's tokens, with as many shots as fit into seq_len. Raises ValueError if it does not fit with none."""
    for n in range(len(shots), -1, -1):
        ids = tokenizer.encode(prompt(subject, shots[:n], question)).ids
        if len(ids) <= seq_len:
            return torch.tensor(ids)
    raise ValueError(f"{subject}: a question of {len(ids)} tokens does not fit into --seq-len {seq_len}; give more")


# ------------------------------------------------------------------------------------------------------- the answers


@torch.inference_mode()
def last_logits(model: Llama, prompts: Iterable[Tensor], seq_len: int) -> Iterator[Tensor]:
    """For each prompt, (length,), the logits of what follows it, (vocab_size,).

    What a prompt has in common with the one before, such as the shots, stays in the cache and is not computed again."""
    like = model.model.norm.weight
    caches = [KVCache(model.config, 1, seq_len, like) for _ in model.model.layers]
    before = torch.tensor([], dtype=torch.int64)
    for ids in prompts:
        n = min(len(before), len(ids) - 1)
        shared = int((before[:n] == ids[:n]).cumprod(0).sum())
        for cache in caches:
            cache.length = shared
        yield model(ids[None, shared:].to(like.device), caches)[0, -1]
        before = ids


def accuracy(
    checkpoint: Checkpoint,
    model: Llama,
    tokenizer: Tokenizer,
    folder: Path,
    n_shots: int,
    seq_len: int,
    limit: int | None = None,
) -> dict[str, tuple[int, int]]:
    """How many questions of each subject were answered right, and how many were asked.

    model: the one of the checkpoint; limit: ask only the first `limit` questions of each subject
    Raises OSError or ValueError for bad files or a tokenizer of another model."""
    names = subjects(folder)
    questions = [(s, row) for s in names for row in read_questions(folder / "test" / f"{s}_test.csv")[:limit]]
    shots = {s: read_questions(folder / "dev" / f"{s}_dev.csv")[:n_shots] if n_shots else [] for s in names}
    letters = [tokenizer.encode(f"Answer: {letter}").ids[-1] for letter in LETTERS]

    # does every question fit, at least without shots? Before the first is asked
    for subject, row in questions:
        prompt_ids(tokenizer, subject, [], row, seq_len)

    right_and_asked = defaultdict(lambda: (0, 0))
    prompts = (checkpoint.check_ids(prompt_ids(tokenizer, s, shots[s], row, seq_len)) for s, row in questions)
    bar = tqdm(zip(questions, last_logits(model, prompts, seq_len)), total=len(questions), unit="question", leave=False)
    for (subject, row), logits in bar:
        right, asked = right_and_asked[subject]
        right_and_asked[subject] = right + (LETTERS[logits[letters].argmax()] == row[5]), asked + 1
        right, asked = map(sum, zip(*right_and_asked.values()))
        bar.set_postfix_str(f"{right / asked:.1%}")
    return dict(right_and_asked)


def table(right_and_asked: dict[str, tuple[int, int]]) -> str:
    """A line per subject, and the share of all questions answered right, which is the average of the original."""
    lines = [
        f"{name.replace('_', ' '):40}{right / asked:7.1%} of {asked}"
        for name, (right, asked) in right_and_asked.items()
    ]
    right, asked = map(sum, zip(*right_and_asked.values()))
    share, error = right / asked, math.sqrt(right * (asked - right) / asked**3)
    lines.append(f"accuracy {share:.1%} +- {error:.1%} (standard error; {asked} questions; guessing: 25%)")
    return "\n".join(lines)


def answer_questions(
    checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path, n_shots: int, seq_len: int, limit: int | None,
    device: torch.device,
) -> str:  # fmt: skip
    """Load the model, ask it and return the table of `table`. Arguments and errors as in `accuracy`."""
    subjects(folder)  # are there any? Before the model is loaded
    on_gpu = device.type == "cuda"
    model = checkpoint.model(torch.bfloat16 if on_gpu else torch.float32, device)

    # on a CPU, dequantize once and not again for every question
    for name, packed in list(model.named_modules()) if not on_gpu else ():
        if isinstance(packed, BCQLinear):
            linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
            model.set_submodule(name, linear)

    return table(accuracy(checkpoint, model, tokenizer, folder, n_shots, seq_len, limit))
