"""MMLU: multiple-choice questions from 57 subjects (Hendrycks et al. 2021), asked as in the original evaluation.

    python eval.py --model FOLDER --mmlu DATA --shots 5

DATA holds the published files, `test/SUBJECT_test.csv` and `dev/SUBJECT_dev.csv`, with lines of question, A, B, C, D,
letter. A prompt shows some solved questions of the subject (the shots, from dev) and then the one to be answered; the
answer is the letter that is most probable after "Answer:". Shots are dropped until the prompt fits.
"""

import csv
import io
import math
import os
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from kernel import BCQEmbedding, BCQLinear
from llama import KVCache, Llama
from support.checkpoint import Checkpoint
from support.data import encode_prompt, read_text

LETTERS = "ABCD"
TOGETHER = 128  # tokens of a batch of texts
WORTH = 32  # tokens saved that are worth a pass of their own


# --------------------------------------------------------------------------------------------------------- the files


def read_questions(path: Path) -> list[list[str]]:
    """The lines of a file: [question, A, B, C, D, letter]. Raises OSError or ValueError naming file and question."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path), newline="")) if row]  # without blank lines
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error}); is it the published file?") from None
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
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5]))
        text += f"{row[0]}{listed}\nAnswer:" + (f" {row[5]}\n\n" if row is not question else "")
    return text


def choices(tokenizer: Tokenizer, subject: str, shots: list[list[str]], question: list[str]) -> list[list[int]]:
    """The tokens of the prompt with each of the four answers behind it."""
    text = prompt(subject, shots, question)
    return [encode_prompt(tokenizer, f"{text} {letter}") for letter in LETTERS]


def fitting_choices(
    tokenizer: Tokenizer, subject: str, shots: list[list[str]], question: list[str], seq_len: int
) -> tuple[list[list[int]], int, bool]:
    """`choices` with as many shots as fit into seq_len, how many those are, and whether the question, which does not
    fit even without shots, has lost its beginning."""
    for n in range(len(shots), -1, -1):
        answers = choices(tokenizer, subject, shots[:n], question)
        if max(map(len, answers)) <= seq_len:
            break
    too_long = max(0, max(map(len, answers)) - seq_len)
    return [ids[too_long:] for ids in answers], n, too_long > 0


# ------------------------------------------------------------------------------------------------------- the answers


class Likelihood(NamedTuple):
    """What a model says of a continuation."""

    log_p: float  # natural logarithm of its probability
    greedy: bool  # is each of its tokens the most likely one?


def stem(batch: list[tuple[list[int], int]]) -> list[int]:
    """The tokens that all texts of a batch begin with, up to the one before the first that is scored.

    >>> stem([([5, 6, 7, 8], 3), ([5, 6, 7, 9], 3), ([5, 6, 7], 2)])
    [5]"""
    return os.path.commonprefix([tokens for tokens, _ in batch])[: min(n for _, n in batch) - 1]


def batched(pairs: Iterable[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Pairs that follow each other, as many as have TOGETHER tokens behind their stem, padding included."""
    batch = []
    for pair in pairs:
        more = [*batch, pair]
        if batch and len(more) * (max(len(tokens) for tokens, _ in more) - len(stem(more))) > TOGETHER:
            yield batch
            more = [pair]
        batch = more
    if batch:
        yield batch


@torch.inference_mode()
def log_probability(model: Llama, pairs: Iterable[tuple[list[int], int]], max_length: int) -> Iterator[Likelihood]:
    """For each pair (tokens, n): the likelihood of the tokens from the n-th on, given those before.

    Reading the weights takes longer than multiplying a few tokens by them, so short texts are computed together. What
    all of a batch begin with, such as the shots, is computed once, if it is long enough to be worth it, and stays in
    the cache for the next batch."""
    like = model.model.norm.weight
    caches = [KVCache(model.config, 1, max_length, like) for _ in model.model.layers]
    before = []
    for batch in batched(pairs):
        shared = stem(batch)
        known = len(os.path.commonprefix([before, shared]))
        if (len(batch) - 1) * len(shared[known:]) < WORTH:
            shared = shared[:known]
        for cache in caches:
            cache.length = known
        if shared[known:]:
            model(torch.tensor([shared[known:]], device=like.device), caches, last_only=True)
        before = shared

        # the rest of each text, padded behind its end, where nothing before it looks
        rest = [torch.tensor(tokens[len(shared) : -1], device=like.device) for tokens, _ in batch]
        ids = nn.utils.rnn.pad_sequence(rest, batch_first=True)  # (batch, length)
        wide = [KVCache(model.config, len(ids), len(shared) + ids.shape[1], like) for _ in caches]
        for cache, copy in zip(caches, wide):
            copy.append(cache.keys[:, :, : len(shared)], cache.values[:, :, : len(shared)])

        # the logits at one place are those of the token at the next
        for (tokens, n), logits in zip(batch, model(ids, wide)):
            answer = torch.tensor(tokens[n:], device=like.device)[:, None]  # (answer, 1)
            logits = logits[n - 1 - len(shared) :][: len(answer)]  # (answer, vocab_size)
            log_p = logits.float().log_softmax(-1).gather(1, answer).sum().item()
            yield Likelihood(log_p, torch.equal(logits.argmax(-1, keepdim=True), answer))


class Score(NamedTuple):
    """How a subject was answered."""

    right: int
    asked: int
    short: int  # questions with fewer shots than asked for
    cut: int  # questions that lost their beginning


def accuracy(
    checkpoint: Checkpoint,
    model: Llama,
    tokenizer: Tokenizer,
    folder: Path,
    n_shots: int,
    seq_len: int,
    limit: int | None = None,
) -> dict[str, Score]:
    """The score of each subject.

    model: the one of the checkpoint; limit: ask only the first `limit` questions of each subject
    Raises OSError or ValueError for bad files or a tokenizer of another model."""
    names = subjects(folder)
    questions = [(s, row) for s in names for row in read_questions(folder / "test" / f"{s}_test.csv")[:limit]]
    shots = {s: read_questions(folder / "dev" / f"{s}_dev.csv")[:n_shots] if n_shots else [] for s in names}
    asked = []  # (subject, right letter, shots, cut?), as the questions are tokenized

    def pairs() -> Iterator[tuple[list[int], int]]:
        """The four answers of every question, from the first token that they do not share."""
        for subject, row in questions:
            answers, n, is_cut = fitting_choices(tokenizer, subject, shots[subject], row, seq_len)
            checkpoint.check_ids(torch.tensor(sum(answers, [])))
            asked.append((subject, row[5], n, is_cut))
            for ids in answers:
                yield ids, len(os.path.commonprefix(answers))

    scores = dict.fromkeys(names, Score(0, 0, 0, 0))
    found = log_probability(model, pairs(), seq_len)
    bar = tqdm(range(len(questions)), unit="question", leave=False)
    for i in bar:
        values = [next(found).log_p for _ in LETTERS]
        subject, letter, n, is_cut = asked[i]
        right = LETTERS[values.index(max(values))] == letter
        old = scores[subject]
        scores[subject] = Score(old.right + right, old.asked + 1, old.short + (n < n_shots), old.cut + is_cut)
        bar.set_postfix_str(f"{sum(s.right for s in scores.values()) / (i + 1):.1%}")
    return scores


def table(scores: dict[str, Score], n_shots: int = 0) -> str:
    """A line per subject, and the share of all questions answered right, which is the average of the original."""
    lines = [f"{name.replace('_', ' '):40}{s.right / s.asked:7.1%} of {s.asked}" for name, s in scores.items()]
    right, asked, short, cut = map(sum, zip(*scores.values()))
    share, error = right / asked, math.sqrt(right * (asked - right) / asked**3)
    notes = [f"standard error; {asked} questions; guessing: 25%"]
    if short:
        notes.append(f"{short} of them with fewer than {n_shots} shots")
    if cut:
        notes.append(f"{cut} too long and cut at the beginning")
    lines.append(f"accuracy {share:.1%} +- {error:.1%} ({'; '.join(notes)})")
    return "\n".join(lines)


def load_model(checkpoint: Checkpoint, device: torch.device) -> Llama:
    """The model that answers: bfloat16 on a GPU; float32 on a CPU, dequantized once and not for every question."""
    on_gpu = device.type == "cuda"
    model = checkpoint.model(torch.bfloat16 if on_gpu else torch.float32, device)
    if on_gpu:
        return model
    for name, packed in list(model.named_modules()):
        if isinstance(packed, BCQLinear) and not isinstance(packed, BCQEmbedding):
            linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
            linear.bias = packed.bias
            model.set_submodule(name, linear)
    return model
