"""MMLU, against a computation from scratch with `transformers`."""

import csv
import random
import shutil

import pytest
import torch
from helpers import call, edit_config, edit_tensors
from transformers import AutoModelForCausalLM

import calibrate
from eval import main
from support.checkpoint import Checkpoint
from support.data import load_tokenizer
from support.tasks import accuracy, log_probability, table

WORDS = "list dict tuple for while return yield import class def lambda print open read write self name".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two subjects in the published layout, 60 and 40 random questions and 5 solved ones each; a few are quoted CSV."""
    folder, draw = tmp_path_factory.mktemp("mmlu"), random.Random(0)

    def question():
        return [" ".join(draw.choices(WORDS, k=draw.randint(1, n))) for n in (6, 2, 2, 2, 2)] + [draw.choice("ABCD")]

    for subject, n in (("short_words", 60), ("code", 40)):
        for part, count in (("test", n), ("dev", 5)):
            (folder / part).mkdir(exist_ok=True)
            rows = [question() for _ in range(count)]
            rows[0][0] = 'A "quoted", question\nof two lines'
            with open(folder / part / f"{subject}_{part}.csv", "w", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory):
    """The toy with a context of 512."""
    return edit_config(shutil.copytree(toy, tmp_path_factory.mktemp("models") / "long"), max_position_embeddings=512)


def rows(data, part, subject):
    with open(data / part / f"{subject}_{part}.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("n_shots, seq_len", [(0, 128), (5, 512), (5, 150)], ids=["0 shots", "5 shots", "some fit"])
@torch.inference_mode()
def test_answers_are_those_of_transformers(n_shots, seq_len, data, model):
    """100 questions, each answer run alone and without a cache; the prompts are written out once more."""
    oracle, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), load_tokenizer(model)
    pairs, values, expected = [], [], {}
    layout = "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:"
    for subject in ("code", "short_words"):
        heading = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        solved = [layout.format(*row) + f" {row[5]}\n\n" for row in rows(data, "dev", subject)[:n_shots]]
        right = short = 0
        for row in rows(data, "test", subject):
            for n in range(n_shots, -1, -1):
                text = heading + "".join(solved[:n]) + layout.format(*row)
                answers = [tokenizer.encode(f"{text} {letter}").ids for letter in "ABCD"]
                if len(answers[0]) <= seq_len:
                    break
            for ids in answers:  # which differ in their last token
                pairs.append((ids, len(ids) - 1))
                values.append(oracle(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)[ids[-1]].item())
            right += values[-4:].index(max(values[-4:])) == "ABCD".index(row[5])
            short += n < n_shots
        expected[subject] = (right, len(rows(data, "test", subject)), short, 0)
    checkpoint = Checkpoint(model)
    ours = checkpoint.model()
    found = [likelihood.log_p for likelihood in log_probability(ours, pairs, seq_len)]
    assert found == pytest.approx(values, abs=1e-4)
    assert accuracy(checkpoint, ours, tokenizer, data, n_shots, seq_len) == expected


def test_command_line_prints_a_line_per_subject_and_the_share_of_all(data, model):
    result = call(main, "--model", model, "--mmlu", data, "--shots", 2, "--limit", 10)
    checkpoint = Checkpoint(model)
    found = accuracy(checkpoint, checkpoint.model(), load_tokenizer(model), data, 2, 512, 10)
    right = sum(score.right for score in found.values())
    *lines, last = result.out.splitlines()
    assert [line.split("%")[1] for line in lines] == [" of 10"] * 2 and lines[1].startswith("short words")
    assert last.startswith(f"accuracy {right / 20:.1%} +- ") and "20 questions" in last


def test_packed_model_answers_like_its_planes(data, model, text, tmp_path):
    """The command line multiplies by weights dequantized once; here, the layers do as they always do."""
    options = ["--text", text, "--method", "rtn", "--bits", 3, "--group-size", 32, "--samples", 2, "--no-baselines"]
    assert call(calibrate.main, "--model", model, "--out", tmp_path / "packed", *options).code == 0
    checkpoint = Checkpoint(tmp_path / "packed")
    expected = table(accuracy(checkpoint, checkpoint.model(), load_tokenizer(model), data, 5, 512, 20), 5)
    assert call(main, "--model", tmp_path / "packed", "--mmlu", data, "--limit", 20).out == expected + "\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shots", -1], "--shots -1: must be at least 0"),
        (["--limit", 0], "--limit 0: must be at least 1"),
        (["--mmlu", "."], ".: has no test/SUBJECT_test.csv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_get_one_line(options, message, data, model):
    result = call(main, "--model", model, "--mmlu", data, *options)
    assert result.code == 2 and message in result.err.strip().splitlines()[-1]


@pytest.mark.parametrize("line", ["just,five,columns,here,A", "a,b,c,d,e,F"])
def test_a_damaged_file_is_named_with_the_question(line, data, model, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    with open(folder / "dev" / "code_dev.csv", "a") as file:
        file.write(line)
    result = call(main, "--model", model, "--mmlu", folder)
    assert result.code == 2 and "code_dev.csv: question 6 is not question, A, B, C, D, letter" in result.err


def test_a_question_that_is_too_long_loses_its_beginning_and_is_counted(data, model, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    with open(folder / "test" / "code_test.csv", "a") as file:
        file.write(f"{'long ' * 600},a,b,c,d,A")
    result = call(main, "--model", model, "--mmlu", folder)
    assert result.code == 0 and "1 of them with fewer than 5 shots; 1 too long and cut at the beginning" in result.out


def test_a_missing_file_is_named(data, model, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "dev" / "code_dev.csv").unlink()
    result = call(main, "--model", model, "--mmlu", folder)
    assert result.code == 2 and "code_dev.csv: cannot read this text file" in result.err


def test_without_shots_no_solved_questions_are_needed(data, model, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(folder / "dev")
    assert call(main, "--model", model, "--mmlu", folder, "--shots", 0, "--limit", 1).code == 0


@pytest.mark.parametrize("content, message", [("", "the file is empty"), ('"' + 200_000 * "x", "not CSV")])
def test_a_file_without_questions_is_named(content, message, data, model, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "test" / "code_test.csv").write_text(content)
    result = call(main, "--model", model, "--mmlu", folder)
    assert result.code == 2 and f"code_test.csv: {message}" in result.err.strip().splitlines()[-1]


def test_a_file_in_another_encoding_is_named(data, model, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "dev" / "code_dev.csv").write_bytes("Säge,1,2,3,4,A\n".encode("latin-1"))
    result = call(main, "--model", model, "--mmlu", folder)
    assert result.code == 2 and "code_dev.csv: not UTF-8 at byte 1" in result.err


def test_a_tokenizer_of_another_model_is_refused(data, model, tmp_path):
    """With a vocabulary of 100 the embedding lacks the tokens that the tokenizer gives."""
    folder = edit_config(shutil.copytree(model, tmp_path / "model"), vocab_size=100)
    names = "model.embed_tokens.weight", "lm_head.weight"
    edit_tensors(folder, lambda stored: stored.update({name: stored[name][:100].clone() for name in names}))
    result = call(main, "--model", folder, "--mmlu", data)
    assert result.code == 2 and "belong to different models?" in result.err
