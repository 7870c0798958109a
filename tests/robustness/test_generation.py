"""eval.py --prompt: where a text ends, how it is shown, how tokens are drawn, and chat templates."""

import io
import json
import math
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from helpers import call, edit_config, edit_tensors
from transformers import AutoTokenizer

from eval import generate, main
from support.chat import as_chat
from support.checkpoint import Checkpoint
from support.data import load_tokenizer
from support.settings import Evaluation

WRITTEN = "xé 漢字→"  # in tokens that are bytes of characters, all different


def without_blocks(model, folder, change):
    """A copy of the model whose blocks add nothing; `change` sets embedding and head."""
    folder = shutil.copytree(model, folder)

    def spoil(stored):
        for name in stored:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                stored[name] = torch.zeros_like(stored[name])
        change(stored["model.embed_tokens.weight"], stored["lm_head.weight"])

    return edit_tensors(folder, spoil)


@pytest.fixture(scope="module")
def writer(toy, tmp_path_factory):
    """The toy made to write what is behind the first character of WRITTEN, over and over, from that character on."""
    ids = load_tokenizer(toy).encode(WRITTEN).ids
    assert len(set(ids)) == len(ids) > len(WRITTEN) + 4

    def change(embedding, head):
        torch.manual_seed(0)
        embedding.copy_(torch.nn.functional.normalize(torch.randn(embedding.shape), dim=1))
        head.zero_()
        head[ids[1:] + ids[:1]] = embedding[ids].clone()

    return without_blocks(toy, tmp_path_factory.mktemp("models") / "writer", change)


@pytest.mark.parametrize("eos", ["config.json", "generation_config.json", "a list", "none", "null in the first"])
def test_a_text_ends_at_its_end_token_and_special_tokens_of_the_prompt_are_shown(eos, writer, tmp_path):
    model = shutil.copytree(writer, tmp_path / "model")
    last = load_tokenizer(model).encode(WRITTEN).ids[-1]
    in_config = {"config.json": last, "a list": [7, last, 2**63], "none": None, "null in the first": last}
    edit_config(model, eos_token_id=in_config.get(eos, 7))
    (model / "generation_config.json").unlink(missing_ok=True)
    if eos == "generation_config.json":
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": last}))
    if eos == "null in the first":
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    result = call(main, "--model", model, "--prompt", "<|end|>x", "--tokens", 30)
    text = result.out.rpartition("\n\n")[0]
    assert text.startswith(f"<|end|>{WRITTEN}"), result.err
    assert (text == f"<|end|>{WRITTEN}") == (eos != "none")


def test_text_is_shown_as_it_comes_in_whole_characters(writer):
    shown = []

    class Terminal(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    with redirect_stdout(Terminal()):
        call_generate(writer, "x", 12, print_flushed)
    assert list(dict.fromkeys(shown)) == [WRITTEN[: n + 1] for n in range(len(WRITTEN))]


def print_flushed(piece):
    print(piece, end="", flush=True)


def call_generate(model, prompt, n_tokens, show, **more):
    settings = Evaluation(model=model, prompt=prompt, tokens=n_tokens, **more)
    return generate(Checkpoint(model), load_tokenizer(model), settings, torch.device("cpu"), show)


@pytest.fixture(scope="module")
def coin(toy, tmp_path_factory):
    """The toy made to write only "x" and "y", whose probabilities are as 9 to 1 at temperature 1, as 3 to 1 at 2."""
    x, y = (load_tokenizer(toy).encode(text).ids[0] for text in "xy")

    def change(embedding, head):
        embedding.fill_(1)
        head.fill_(-100 / 64)
        head[x], head[y] = math.log(9) / 64, 0

    return edit_config(
        without_blocks(toy, tmp_path_factory.mktemp("models") / "coin", change), max_position_embeddings=2048
    )


def test_tokens_are_drawn_at_the_temperature(coin):
    texts = {}
    for temperature, seed in ((1, 0), (2, 0), (2, 0), (2, 1), (1e-40, 0), (0, 0)):
        pieces = []
        call_generate(coin, "x", 1000, pieces.append, temperature=temperature, seed=seed)
        text = "".join(pieces)[1:]
        assert len(text) == 1000 and set(text) <= {"x", "y"}
        assert texts.setdefault((temperature, seed), text) == text  # the same seed, the same text
    shares = {key: text.count("x") / 1000 for key, text in texts.items()}
    assert shares[1, 0] == pytest.approx(0.9, abs=0.04)  # four standard errors
    assert shares[2, 0] == pytest.approx(0.75, abs=0.055)
    assert texts[2, 0] != texts[2, 1]
    assert shares[1e-40, 0] == shares[0, 0] == 1


TEMPLATES = {
    "roles": "{% for m in messages %}\n  <{{ m['role'] }}>{{ m.content | trim }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "special tokens": "{{ bos_token }}{{ messages[0].content | tojson }}{{ eos_token }}{{ sep_token }}",
    "no tools": "{% if tools is not none or documents is not none %}tools{% else %}none{% endif %}",
    "a loop that ends": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "the year": "{{ strftime_now('%Y') }}{% generation %}a{% endgeneration %}{% if tools %}tools{% endif %}",
}


@pytest.mark.parametrize("kind", ["file", "settings", "list"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_gives_the_text_of_transformers(name, kind, toy, tmp_path):
    model, template = shutil.copytree(toy, tmp_path / "model"), TEMPLATES[name]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<|end|>", "__type": "AddedToken"},
    }
    settings |= {"eos_token": "<|end|>", "sep_token": None}
    if kind == "file":
        (model / "chat_template.jinja").write_text(template)
        settings["chat_template"] = "the file counts"
    else:
        both = [{"name": "other", "template": "no"}, {"name": "default", "template": template}]
        settings["chat_template"] = template if kind == "settings" else both
    (model / "tokenizer_config.json").write_text(json.dumps(settings))

    messages = [{"role": "user", "content": ' What "is" it, 漢?\n'}]
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert as_chat(model, messages[0]["content"]) == expected


def test_chat_continues_the_text_of_the_template_and_shows_the_question(writer, tmp_path):
    model = shutil.copytree(writer, tmp_path / "model")
    (model / "chat_template.jinja").write_text("<|end|>{{ messages[0].content }}<|end|>x")
    result = call(main, "--model", model, "--prompt", "What?", "--tokens", 12, "--chat")
    assert result.out.startswith(f"What?\n\n{WRITTEN[1:]}\n\n"), result.err


BROKEN = {
    "none": (None, "there is no chat_template.jinja; leave --chat out"),
    "no program": ("{% for %}", "no chat template that can be used ("),
    "one that refuses": ("{{ raise_exception('no system message') }}", "(no system message)"),
    "one that breaks out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "one that fails": ("{{ 1 / 0 }}", "(division by zero)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_chat_template_that_cannot_be_used_is_said(case, toy, tmp_path):
    model, (template, message) = shutil.copytree(toy, tmp_path / "model"), BROKEN[case]
    if template:
        (model / "chat_template.jinja").write_text(template)
    result = call(main, "--model", model, "--prompt", "x", "--chat")
    assert result.code == 2 and message in result.err.strip() and result.out == ""
    assert result.err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "option, others",
    [("--chat", "--prompt"), ("--tokens 8", "--prompt"), ("--temperature 0.5", "--prompt")]
    + [
        ("--seed 1", "--temperature"),
        ("--seed 1 --prompt x", "--temperature"),
        ("--cloze", "--mmlu"),
        ("--shots 0", "--mmlu"),
        ("--limit 3", "--task or --mmlu"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(option, others, toy):
    result = call(main, "--model", toy, *option.split())
    assert result.code == 2 and f"error: {option.split()[0]}: belongs to {others}; give that too" in result.err


@pytest.mark.parametrize(
    "option, other",
    [("--text x", "--prompt def"), ("--text x", "--task x"), ("--text x", "--mmlu x"), ("--seq-len 8", "--prompt def")]
    + [("--shots 3", "--cloze --mmlu x")],
)
def test_an_option_that_another_makes_void_is_refused(option, other, toy):
    result = call(main, "--model", toy, *option.split(), *other.split())
    message = f"error: {option.split()[0]}: means nothing with {other.split()[0]}; leave it out"
    assert result.code == 2 and message in result.err
