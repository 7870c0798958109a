"""Perplexity and generation."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import eval as evaluation
from eval import cut, load_tokenizer, perplexity, read_text, standard_library_text, tokenize
from llama import Checkpoint


def evaluate(*arguments):
    return subprocess.run([sys.executable, "eval.py", *map(str, arguments)], capture_output=True, text=True)


def perplexity_by_transformers(folder, windows):
    """From scratch: each window alone, the mean of its token losses, the exponential of the mean over windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        losses = [F.cross_entropy(model(w[None]).logits[0, :-1], w[1:]).item() for w in windows]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_the_one_of_transformers(toy, text):
    windows = cut(tokenize(load_tokenizer(toy), read_text(text), "text", 64), 64)
    assert len(windows) > 30
    ours = perplexity(Checkpoint(toy), windows)
    assert ours == pytest.approx(perplexity_by_transformers(toy, windows), rel=1e-5)


def test_command_line_ends_with_the_perplexity_its_text_and_its_windows(toy, text):
    result = evaluate("--model", toy, "--text", text, "--seq-len", 50)
    ids = load_tokenizer(toy).encode(read_text(text)).ids
    expected = perplexity(Checkpoint(toy), cut(torch.tensor(ids), 50))
    assert (
        result.stdout.splitlines()[-1] == f"perplexity {expected:.4f} (text.txt, seq_len 50, {len(ids) // 50} windows)"
    )


def test_prompt_is_continued_and_timed(toy):
    result = evaluate("--model", toy, "--prompt", "def f(x):", "--tokens", 5)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def f(x):") and result.stdout.rstrip().endswith("tokens/s")


def test_windows_do_not_overlap_and_drop_the_rest():
    assert cut(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_two_halves_of_the_standard_library_share_no_file():
    train, held_out = standard_library_text(False), standard_library_text(True)
    assert len(train) > 10 * len(held_out) > 100_000
    longest = max(held_out.split("\n\n"), key=len)
    assert longest not in train


def test_nothing_runs_at_import():
    assert callable(evaluation.main)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read this text file"),
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"abc \xff\xfe", "not UTF-8 at byte 4"),
        (b"short", "tokens are less than one window of 64"),
    ],
)
def test_bad_texts_get_one_line_and_exit_code_2(content, message, toy, tmp_path):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    result = evaluate("--model", toy, "--text", path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert message in result.stderr and "bad.txt" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seq-len", "65"], "--seq-len 65: choose 2 to 64"),
        (["--seq-len", "1"], "--seq-len 1: choose 2 to 64"),
        (["--device", "tpu9"], "--device tpu9: not usable here"),
        (["--prompt", ""], "do not fit: 1 to 64 in all"),
        (["--prompt", "x", "--tokens", "64"], "do not fit"),
        (["--tokens", "many"], "invalid int value"),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2(arguments, message, toy):
    result = evaluate("--model", toy, *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert message in result.stderr.strip().splitlines()[-1]
