"""Perplexity and generation."""

import pytest
import torch
from helpers import call, perplexity_by_transformers

from eval import main, perplexity
from support.checkpoint import Checkpoint
from support.data import cut, load_tokenizer, read_text, standard_library_text, tokenize


def test_perplexity_is_the_one_of_transformers(toy, text):
    windows = cut(tokenize(load_tokenizer(toy), read_text(text), "text", 64), 64)
    assert len(windows) > 30
    ours = perplexity(Checkpoint(toy), windows)
    assert ours == pytest.approx(perplexity_by_transformers(toy, windows), rel=1e-5)


def test_command_line_ends_with_the_perplexity_its_text_and_its_windows(toy, text):
    result = call(main, "--model", toy, "--text", text, "--seq-len", 50)
    ids = load_tokenizer(toy).encode(read_text(text)).ids
    expected = perplexity(Checkpoint(toy), cut(torch.tensor(ids), 50))
    assert result.out.splitlines()[-1] == f"perplexity {expected:.4f} (text.txt, seq_len 50, {len(ids) // 50} windows)"


def test_prompt_is_continued_and_timed(toy):
    result = call(main, "--model", toy, "--prompt", "def f(x):", "--tokens", 5)
    assert result.code == 0, result.err
    assert result.out.startswith("def f(x):") and result.out.rstrip().endswith("GB/s of weights")


def test_windows_do_not_overlap_and_drop_the_rest():
    assert cut(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_two_halves_of_the_standard_library_share_no_file():
    train, held_out = standard_library_text(False), standard_library_text(True)
    assert len(train) > 10 * len(held_out) > 100_000
    longest = max(held_out.split("\n\n"), key=len)
    assert longest not in train
