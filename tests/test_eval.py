"""Perplexity and generation."""

import pytest
import torch
from helpers import call, perplexity_by_transformers
from transformers import AutoModelForCausalLM

import calibrate
from eval import compare, main, perplexity
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


def test_the_distance_from_the_original_is_that_of_transformers(toy, text, tmp_path):
    """KL divergence and the same most likely token, position by position, from the logits of both models."""
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    options = ["--model", toy, "--text", text, "--method", "bcq", "--group-size", 32, "--samples", 4, "--no-baselines"]
    for out, kind in ((packed, []), (plain, ["--dequantized"])):
        assert call(calibrate.main, *options, "--out", out, *kind).code == 0

    windows = cut(tokenize(load_tokenizer(toy), read_text(text), "text", 64), 64)[:10]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (plain, toy)]
    with torch.inference_mode():
        log_q, log_p = (model(windows).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in models)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)

    found = compare(Checkpoint(packed), Checkpoint(toy), windows)
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=2e-2)
    assert found.kl_99 == pytest.approx(kl.quantile(0.99).item(), rel=5e-2)
    assert found.same_token == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(), abs=0.01)
    assert found.perplexity == pytest.approx(perplexity(Checkpoint(packed), windows), rel=1e-5)
    assert found.perplexity_original == pytest.approx(perplexity(Checkpoint(toy), windows), rel=1e-5)
