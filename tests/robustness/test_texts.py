"""Texts become the right tokens, a piece at a time as well, and the pages say what the bundled model makes of them."""

import json
import platform
import random
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from eval import perplexity
from experiments import page
from support.checkpoint import Checkpoint
from support.data import OVERLAP, cut, encode, load_text, load_tokenizer, tokenize
from support.settings import TINY

ROOT = Path(__file__).parent.parent.parent
DRAW = random.Random(0)
PIECE = 2**13  # characters
WORDS = (
    "the quick brown fox jumps naïve cafe\u0301 ﬁne 漢字 👩‍👩‍👧 x1 = y[3]; 12345 don't <|end|> aaa \t __init__".split(
        " "
    )
)


def some_text(n_words):
    """Words, symbols of several code points, runs of blanks and lines, special tokens, some text without any blank."""
    parts = DRAW.choices([*(word + " " for word in WORDS), "\n", "\n\n", "    ", "\r\n", "漢字漢", "\u3000"], k=n_words)
    return "".join(parts)


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(some_text(5_000).split("\n"), trainer)
    return tokenizer


def like_llama_2():
    """Bytes where a character is unknown, ▁ for blanks and before the text, a token for its beginning."""
    tokenizer = trained(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
            limit_alphabet=40,
            show_progress=False,
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram():
    """Compatible forms of characters become one, and a token stands at the end."""
    tokenizer = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def bundled():
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


class Watched:
    """A tokenizer that keeps the lengths of the texts that it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.lengths = tokenizer, []

    def encode(self, text, **options):
        self.lengths.append(len(text))
        return self.tokenizer.encode(text, **options)


@pytest.mark.parametrize("make", [bundled, like_llama_2, unigram])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(make):
    text, tokenizer = some_text(12_000), Watched(make())
    assert len(text) > 5 * PIECE
    assert encode(tokenizer, text, PIECE).tolist() == tokenizer.tokenizer.encode(text).ids
    assert max(tokenizer.lengths) <= PIECE + OVERLAP  # it never was encoded whole


def test_tokens_that_depend_on_what_is_far_away_are_those_of_the_whole():
    """Which two letters make a pair depends on where their run begins."""
    tokenizer = Watched(Tokenizer(models.BPE(vocab={"a": 0, "aa": 1, "b": 2}, merges=[("a", "a")])))
    text = "b" * 100 + "a" * 30_000
    assert encode(tokenizer, text, PIECE + 1).tolist() == tokenizer.tokenizer.encode(text).ids
    assert max(tokenizer.lengths) == len(text)


def test_the_pages_say_the_perplexity_of_the_bundled_original_and_on_how_many_windows():
    """They were measured on the library of one Python; that of another is a little different."""
    text, name = load_text(None, held_out=True)
    windows = cut(tokenize(load_tokenizer(TINY), text, name, 512), 512)[::6]  # as in `load_texts`
    value = perplexity(Checkpoint(TINY), windows)

    readme, results = ((ROOT / name).read_text("utf-8") for name in ("README.md", "RESULTS.md"))
    store = json.loads((ROOT / "experiments" / "results.json").read_text("utf-8"))
    run = store["runs"][page.ablation()]
    is_same = run["versions"]["python"] == platform.python_version()
    printed = float(re.search(r"original +([\d.]+)", readme)[1])
    n_printed = int(re.search(rf"{name}, seq_len 512, (\d+) windows", readme)[1])
    assert value == pytest.approx(printed, abs=6e-4 if is_same else 0.5)
    assert len(windows) == pytest.approx(n_printed, rel=0 if is_same else 0.2)
    assert f"has {printed:.2f}," in " ".join(results.split()) and run["eval_windows"] == n_printed
