"""Tasks scored by the probability of a text, as the field scores them: the model never has to follow an instruction.

    python eval.py --model FOLDER --task blimp                # a folder of files, or one file
    python eval.py --model FOLDER --task lambada_openai.jsonl --limit 500
    python eval.py --model FOLDER --mmlu DATA --cloze

A file holds a JSON object a line, and its keys say what to do:

    sentence_good, sentence_bad    BLiMP: is the good sentence more probable than the bad one?
    context, continuation          LAMBADA: is the continuation what the model finds most likely, token by token?
    query, choices, gold           PIQA, ARC: is the right answer the most probable after "query\\nAnswer:"?

The last is also scored by the log-probability for each character (acc_norm), which is fairer to long answers.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Iterator

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from llama import Llama
from support.checkpoint import Checkpoint
from support.data import encode_prompt, read_text
from support.tasks import LETTERS, log_probability, read_questions, subjects

KINDS = (  # what the items of a task hold
    {"query": str, "choices": list, "gold": int},
    {"sentence_good": str, "sentence_bad": str},
    {"context": str, "continuation": str},
)


def is_sound(item: dict) -> bool:
    """Whether an item can be answered."""
    if "choices" in item:
        choices = item["choices"]
        return item["gold"] in range(len(choices)) and all(isinstance(choice, str) for choice in choices)
    return all(text.strip() for key, text in item.items() if key != "context")


def item_of(x: object) -> dict | None:
    """The part of x, read from JSON, that makes it an item of a task; None if it is none.

    >>> item_of({"query": "Is it?", "choices": ["yes", "no"], "gold": 1, "id": 7}), item_of({"query": "Is it?"})
    ({'query': 'Is it?', 'choices': ['yes', 'no'], 'gold': 1}, None)"""
    for kind in KINDS if isinstance(x, dict) else ():
        if all(isinstance(x.get(key), form) for key, form in kind.items()):
            item = {key: x[key] for key in kind}
            return item if is_sound(item) else None
    return None


def read_items(path: Path, limit: int | None = None) -> list[dict]:
    """The items of a .jsonl file, or of all in a folder, the first `limit` of each. Raises OSError or ValueError."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise OSError(f"{path}: no .jsonl file in this folder; give the file of a task, or a folder with some")
    items = []
    for file in files:
        lines = [(n, line) for n, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
        for n, line in lines[:limit]:
            item = None
            with contextlib.suppress(ValueError, RecursionError):
                item = item_of(json.loads(line))
            if item is None:
                raise ValueError(
                    f"{file}: line {n}, {line:.40}, is not an item of a task; support/cloze.py says what is"
                )
            items.append(item)
    return items


def mmlu_items(folder: Path, limit: int | None = None) -> list[dict]:
    """MMLU's questions with the texts of the answers instead of their letters."""
    rows = [row for s in subjects(folder) for row in read_questions(folder / "test" / f"{s}_test.csv")[:limit]]
    return [{"query": f"Question: {row[0]}", "choices": row[1:5], "gold": LETTERS.index(row[5])} for row in rows]


def continuations(item: dict) -> list[tuple[str, str]]:
    """The pairs (context, continuation) that decide an item.

    >>> continuations({"query": "Question: Is it?", "choices": ["yes", "no"], "gold": 1})
    [('Question: Is it?\\nAnswer:', ' yes'), ('Question: Is it?\\nAnswer:', ' no')]"""
    if "sentence_good" in item:
        return [("", item["sentence_good"]), ("", item["sentence_bad"])]
    if "continuation" in item:
        return [(item["context"], " " + item["continuation"].strip())]
    context = item["query"].rstrip("\n") + "\nAnswer:"
    return [(context, f" {choice}") for choice in item["choices"]]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, first: int) -> tuple[list[int], int]:
    """(tokens, n): the continuation's tokens are those from the n-th on.

    first: the token that stands before a text without a context. Raises ValueError if no token is left to predict"""
    known = encode_prompt(tokenizer, context) if context else []
    ids = encode_prompt(tokenizer, context + continuation)
    if not known:
        ids, known = ids if ids[:1] == [first] else [first, *ids], [first]  # some tokenizers begin with it
    if len(ids) < 2:
        raise ValueError(f"an item of the task, {context + continuation!r:.40}: this tokenizer makes no tokens of it")
    return ids, min(len(known), len(ids) - 1)


def answers(
    checkpoint: Checkpoint, model: Llama, tokenizer: Tokenizer, items: list[dict], max_length: int = 2048
) -> Iterator[tuple[bool, bool, bool]]:
    """For each item: right? Right by the log-probability for each character (equal where there are no choices)? And
    has it lost its beginning, since it is longer than max_length tokens?

    Raises ValueError if the tokenizer belongs to another model."""
    bos = checkpoint.raw_config.get("bos_token_id")
    first = bos if checkpoint.is_token(bos) else (checkpoint.eos_ids() or (0,))[0]
    max_length = min(max_length, checkpoint.config.max_position_embeddings)
    too_long = []  # by how many tokens, of each pair

    def encoded() -> Iterator[tuple[list[int], int]]:
        for item in items:
            for pair in continuations(item):
                ids, n = encode_pair(tokenizer, *pair, first)
                checkpoint.check_ids(torch.tensor(ids))
                too_long.append(max(0, len(ids) - max_length))
                yield ids[too_long[-1] :], max(1, n - too_long[-1])

    found = log_probability(model, encoded(), max_length)
    for item in items:
        texts = [text for _, text in continuations(item)]
        values = [next(found) for _ in texts]
        is_cut = any([too_long.pop(0) for _ in texts])
        if "continuation" in item:
            yield values[0].greedy, values[0].greedy, is_cut
        else:
            gold = item.get("gold", 0)  # of a pair, the first is the good one
            sizes = map(len, item.get("choices", texts))  # without the blank before an answer
            by_character = [value.log_p / max(1, size) for value, size in zip(values, sizes)]
            best = max(range(len(texts)), key=lambda i: values[i].log_p)
            yield best == gold, max(range(len(texts)), key=by_character.__getitem__) == gold, is_cut


def answer_items(checkpoint: Checkpoint, model: Llama, tokenizer: Tokenizer, items: list[dict], max_length: int) -> str:
    """One line: accuracy with its standard error, and for answers by choice acc_norm."""
    right = right_norm = cut = 0
    bar = tqdm(answers(checkpoint, model, tokenizer, items, max_length), total=len(items), unit="item", leave=False)
    for n, (is_right, is_right_norm, is_cut) in enumerate(bar, 1):
        right += is_right
        right_norm += is_right_norm
        cut += is_cut
        bar.set_postfix_str(f"{right / n:.1%}")

    def shown(n_right: int) -> str:
        share = n_right / len(items)
        return f"{share:.1%} +- {math.sqrt(share * (1 - share) / len(items)):.1%}"

    norm = f", acc_norm {shown(right_norm)}" if all("choices" in item for item in items) else ""
    notes = f"; {cut} of them too long and cut at the beginning" if cut else ""
    return f"accuracy {shown(right)}{norm} (standard error; {len(items)} items{notes})"
