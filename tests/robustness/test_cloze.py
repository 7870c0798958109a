"""Tasks by the probability of a text, against a computation from scratch with transformers."""

import json
import random
import shutil

import pytest
import torch
from helpers import call, edit_config, edit_tensors
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from eval import main
from support.checkpoint import Checkpoint
from support.cloze import answers, continuations, encode_pair, item_of, read_items
from support.data import load_tokenizer
from support.tasks import log_probability

WORDS = "list dict tuple for while return yield import class def lambda print open read write self name".split()
DRAW = random.Random(0)


def words(most):
    return " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, most)))


KINDS = {
    "pairs": lambda: {"sentence_good": words(8), "sentence_bad": words(8)},
    "last words": lambda: {"context": words(12), "continuation": words(1)},
    "multiple choice": lambda: {"query": words(9), "choices": [words(4) for _ in range(4)], "gold": DRAW.randrange(4)},
}


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory):
    """The toy with a context of 512."""
    folder = shutil.copytree(toy, tmp_path_factory.mktemp("models") / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_hundred_items_are_answered_as_by_transformers(kind, model, tmp_path):
    """Every continuation scored alone, without a cache."""
    items = [KINDS[kind]() for _ in range(100)]
    oracle, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), load_tokenizer(model)
    expected, pairs, values = [], [], []
    for item in items:
        scores, greedy = [], []
        for context, continuation in continuations(item):
            known = tokenizer.encode(context).ids or [1]  # the toy's token for the beginning of a text
            ids = (known if not context else []) + tokenizer.encode(context + continuation).ids
            log_p = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(known), len(ids))
            scores.append(sum(log_p[i - 1, ids[i]].item() for i in places))
            greedy.append(all(log_p[i - 1].argmax() == ids[i] for i in places))
            pairs.append((ids, len(known)))
        values += scores
        expected.append(greedy[0] if kind == "last words" else scores.index(max(scores)) == item.get("gold", 0))

    checkpoint = Checkpoint(model)
    ours = checkpoint.model()
    assert [found.log_p for found in log_probability(ours, pairs, 512)] == pytest.approx(values, abs=1e-4)
    assert [right for right, *_ in answers(checkpoint, ours, tokenizer, items)] == expected

    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, items)) + "\n\n")
    assert f"accuracy {sum(expected) / 100:.1%} +- " in call(main, "--model", model, "--task", path).out


def test_mmlu_by_the_texts_of_the_answers(model, tmp_path):
    for part in ("test", "dev"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"code_{part}.csv").write_text("what is it,list,dict,for,while,B\n" * 4)
    result = call(main, "--model", model, "--mmlu", tmp_path, "--cloze")
    assert result.code == 0 and "acc_norm" in result.out and "4 items" in result.out


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("{", "line 1, {, is not an item"),
        ("[" * 100_000, "line 1, [[["),
        (json.dumps(KINDS["pairs"]()) + "\n\n7", "line 3, 7, is not an item"),
        ('{"a": 1}', 'line 1, {"a": 1}, is not an item of a task'),
        ('{"context": 1, "continuation": "a"}', "is not an item"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "is not an item"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "is not an item"),
        ('{"sentence_good": "", "sentence_bad": "a"}', "is not an item"),
        ('{"context": "a", "continuation": " "}', "is not an item"),
    ],
    ids=str,
)
def test_a_file_that_is_not_a_task_is_said(content, message, model, tmp_path):
    (tmp_path / "items.jsonl").write_text(content)
    result = call(main, "--model", model, "--task", tmp_path / "items.jsonl")
    assert result.code == 2 and message in result.err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_of_one_kind_whatever_else_it_holds(kind):
    item = KINDS[kind]()
    for more in ({"gold": 1}, {"choices": 3}, {"continuation": None}, {"sentence_good": 7}, {"context": [], "id": 7}):
        assert item_of(more | item) == item


def test_acc_norm_is_given_where_every_item_has_choices(model, tmp_path):
    items = [KINDS["multiple choice"](), KINDS["pairs"]()]
    for name, these in (("choices", items[:1]), ("both", items), ("reversed", items[::-1])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, these)))
        said = call(main, "--model", model, "--task", tmp_path / name).out
        assert said.startswith("accuracy ") and ("acc_norm" in said) == (name == "choices")


def test_a_folder_without_tasks_is_said(model, tmp_path):
    result = call(main, "--model", model, "--task", tmp_path)
    assert result.code == 2 and "no .jsonl file in this folder" in result.err


def test_a_tokenizer_of_another_model_is_said(model, tmp_path):
    small = shutil.copytree(model, tmp_path / "small")
    edit_config(small, vocab_size=100)
    names = "model.embed_tokens.weight", "lm_head.weight"
    edit_tensors(small, lambda stored: stored.update({name: stored[name][:100].clone() for name in names}))
    (tmp_path / "items.jsonl").write_text(json.dumps(KINDS["pairs"]()))
    result = call(main, "--model", small, "--task", tmp_path / "items.jsonl")
    assert result.code == 2 and "belong to different models?" in result.err


@pytest.mark.parametrize("token", (-1, 2048, 2**63, True, "<s>"))
def test_a_first_token_that_the_model_does_not_know_is_as_good_as_none(token, model, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(KINDS["pairs"]()))
    said = []
    for bos in (None, token):
        changed = edit_config(shutil.copytree(model, tmp_path / f"model {bos is None}"), bos_token_id=bos)
        said.append(call(main, "--model", changed, "--task", tmp_path / "items.jsonl"))
    assert said[0].code == 0 and said[0] == said[1]


def test_items_that_do_not_fit_are_counted(toy, tmp_path):
    """The toy has a context of 64 tokens."""
    items = [{"context": f"{word} " * 100, "continuation": "list"} for word in ("for", "while")] + [
        {"context": "a dict or a", "continuation": "list"}
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    result = call(main, "--model", toy, "--task", tmp_path / "items.jsonl")
    assert "3 items; 2 of them too long and cut at the beginning)" in result.out


def test_the_answer_for_each_character_does_not_count_the_blank_before_it(model):
    """As in lm-eval: the log-probability of " a" is divided by 1, that of " abc" by 3."""
    checkpoint, tokenizer = Checkpoint(model), load_tokenizer(model)
    items = [{"query": words(5), "choices": [words(1), words(6)], "gold": 0} for _ in range(60)]
    pairs = [pair for item in items for pair in continuations(item)]
    encoded = [encode_pair(tokenizer, *pair, 1) for pair in pairs]
    values = [found.log_p for found in log_probability(checkpoint.model(), encoded, 512)]
    shares = [value / len(text.removeprefix(" ")) for value, (_, text) in zip(values, pairs)]
    expected = [short >= long for short, long in zip(shares[::2], shares[1::2])]
    assert [right for _, right, _ in answers(checkpoint, checkpoint.model(), tokenizer, items)] == expected


def test_a_folder_gives_the_first_of_each_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(KINDS["pairs"]()) for _ in range(5)))
    assert len(read_items(tmp_path, limit=2)) == 4


def test_a_text_without_context_begins_once(model):
    """With a tokenizer that begins every text by itself, as Llama's do, and with one that does not."""
    tokenizer = load_tokenizer(model)
    ids, n = encode_pair(tokenizer, "", "def read", first=1)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert encode_pair(tokenizer, "", "def read", first=1) == (ids, n) and (ids.count(1), n) == (1, 1)


def test_a_text_of_which_a_tokenizer_leaves_nothing_is_said(model):
    tokenizer = load_tokenizer(model)
    tokenizer.normalizer = Strip()
    with pytest.raises(ValueError, match="an item of the task, '  ': this tokenizer makes no tokens of it"):
        encode_pair(tokenizer, "", "  ", first=1)
