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

import json
import math
from pathlib import Path
from typing import Iterator

from tokenizers import Tokenizer
from tqdm import tqdm

from llama import Llama
from support.checkpoint import Checkpoint
from support.data import encode_prompt
from support.tasks import LETTERS, log_probability, read_questions, subjects

KEYS = {("sentence_good", "sentence_bad"), ("context", "continuation"), ("query", "choices", "gold")}  # of an item


def read_items(path: Path, limit: int | None = None) -> list[dict]:
    """The items of a .jsonl file, or of all in a folder, the first `limit` of each. Raises OSError or ValueError."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    items = []
    for file in files:
        try:
            lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
            items += [json.loads(line) for line in lines[:limit]]
        except OSError as error:
            raise OSError(f"{file}: cannot read the items ({error.strerror})") from None
        except ValueError as error:
            raise ValueError(f"{file}: not a JSON object a line ({error})") from None
    wrong = [x for x in items if not (isinstance(x, dict) and any(all(key in x for key in keys) for keys in KEYS))]
    if not items or wrong:
        raise ValueError(f"{path}: {str(wrong[:1])[1:61] or 'no items'}: not an item of a task, see support/cloze.py")
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


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, first: int, max_length: int) -> tuple[list, int]:
    """(tokens, n): the continuation's tokens are those from the n-th on. What is too long loses its beginning.

    first: the token that stands before a text without a context"""
    known = encode_prompt(tokenizer, context) if context else []
    ids = encode_prompt(tokenizer, context + continuation)
    if not known:
        ids, known = [first, *ids], [first]
    n_continued = max(1, len(ids) - len(known))
    ids = ids[-max_length:]
    return ids, max(1, len(ids) - n_continued)


def answers(
    checkpoint: Checkpoint, model: Llama, tokenizer: Tokenizer, items: list[dict]
) -> Iterator[tuple[bool, bool]]:
    """For each item: right? And right by the log-probability for each character? (Equal where there are no choices.)"""
    bos = checkpoint.raw_config.get("bos_token_id")
    first = bos if bos is not None else (checkpoint.eos_ids() or (0,))[0]
    max_length = checkpoint.config.max_position_embeddings
    pairs = [pair for item in items for pair in continuations(item)]
    encoded = (encode_pair(tokenizer, *pair, first, max_length) for pair in pairs)
    found = log_probability(model, encoded, max_length)

    for item in items:
        texts = [text for _, text in continuations(item)]
        values = [next(found) for _ in texts]
        if "continuation" in item:
            yield values[0].greedy, values[0].greedy
        else:
            gold = 0 if "sentence_good" in item else item["gold"]  # of a pair, the first is the good one
            by_character = [value.log_p / len(text) for value, text in zip(values, texts)]
            best = max(range(len(texts)), key=lambda i: values[i].log_p)
            yield best == gold, max(range(len(texts)), key=by_character.__getitem__) == gold


def answer_items(checkpoint: Checkpoint, model: Llama, tokenizer: Tokenizer, items: list[dict]) -> str:
    """One line: accuracy with its standard error, and for answers by choice acc_norm."""
    right = right_norm = 0
    bar = tqdm(answers(checkpoint, model, tokenizer, items), total=len(items), unit="item", leave=False)
    for n, (is_right, is_right_norm) in enumerate(bar, 1):
        right += is_right
        right_norm += is_right_norm
        bar.set_postfix_str(f"{right / n:.1%}")

    def shown(n_right: int) -> str:
        share = n_right / len(items)
        return f"{share:.1%} +- {math.sqrt(share * (1 - share) / len(items)):.1%}"

    norm = f", acc_norm {shown(right_norm)}" if "choices" in items[0] else ""
    return f"accuracy {shown(right)}{norm} (standard error; {len(items)} items)"
