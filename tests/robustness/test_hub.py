"""Models and texts by name, from a server on this machine that speaks the Hub's paths."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.hub import model_folder
from support.settings import TINY

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """repositories: {"models/org/name": {file: bytes}}; gated: names that need a licence; broken: files whose
    connection breaks half way, once."""

    repositories, gated, broken, asked = {}, set(), set(), []

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        self.asked.append(path)
        if path.startswith("api/"):
            return self.answer_api(path.removeprefix("api/"))
        kind = "datasets/" if path.startswith("datasets/") else "models/"
        repository, _, rest = path.removeprefix("datasets/").partition("/resolve/")
        file = rest.partition("/")[2]
        files = self.repositories.get(kind + repository)
        if repository in self.gated:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="accept the licence")
        if files is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        if file.endswith("00002.safetensors") and self.command == "GET" and "moved" not in self.path:
            return self.answer(302, Location=f"/{path}?moved=1")
        self.answer_file(files[file], file)

    def answer_file(self, content, file=""):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0] or 0)
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if file in self.broken and self.command == "GET":
            self.broken.discard(file)
            self.send_response(200)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if start else 200, content[start:], **headers)

    def answer_api(self, path):
        kind, repository, rest = path.partition("/")[0], "/".join(path.split("/")[1:3]), path.split("/")[3:]
        files = self.repositories.get(f"{kind}/{repository}")
        if repository in self.gated:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="accept the licence")
        if files is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT, "v1"):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if rest and rest[0] == "tree":
            listed = [
                {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for f, c in files.items()
            ]
        else:
            listed = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files], "private": False}
        self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")


@pytest.fixture
def hub(toy, tmp_path):
    """A server with the toy as org/toy, in two shards; `run` calls eval.py with it for the Hub and an empty cache."""
    folder = shutil.copytree(toy, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in ((1, names[:9]), (2, names[9:])):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "consolidated.00.pth").write_bytes(b"not wanted" * 1000)

    class ThisHub(Hub):
        repositories = {"models/org/toy": {path.name: path.read_bytes() for path in folder.iterdir()}}
        gated, broken, asked = set(), set(), []

    server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }  # fmt: skip

    def run(*options, program=("eval.py",), **more):
        command = [sys.executable, *program, *map(str, options)]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    ThisHub.run = staticmethod(run)
    yield ThisHub
    server.shutdown()


def last_line(result):
    return result.stderr.strip().splitlines()[-1]


def test_a_sharded_model_is_fetched_once_and_only_what_is_needed(hub, toy, text):
    options = ["--text", text]
    expected = hub.run("--model", toy, *options).stdout
    assert expected.startswith("perplexity")
    assert hub.run("--model", "org/toy", *options).stdout == expected, hub.run("--model", "org/toy", *options).stderr
    assert not any("consolidated" in path for path in hub.asked if "resolve" in path)

    hub.repositories.clear()  # from here on nothing can be had
    assert hub.run("--model", "org/toy", *options, HF_HUB_OFFLINE="1").stdout == expected


def test_a_revision_can_be_named_and_one_that_is_not_there_is_said(hub, text):
    assert hub.run("--model", "org/toy@v1", "--text", text).stdout.startswith("perplexity")
    result = hub.run("--model", "org/toy@v9", "--text", text)
    assert result.returncode == 2 and "org/toy: has no revision v9" in last_line(result)


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/nothing", "not on the Hub, or private"),
        ("org/gated", "is gated"),
        ("org/a--b", "no name that the Hub allows"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(name, message, hub, text):
    hub.gated.add("org/gated")
    result = hub.run("--model", name, "--text", text)
    assert result.returncode == 2 and message in last_line(result) and "Traceback" not in result.stderr


def test_a_text_that_is_no_longer_there_is_named(hub, toy):
    hub.repositories["datasets/ggml-org/ci"] = {"other.zip": b""}
    result = hub.run("--model", toy, "--text", "wikitext2")
    assert result.returncode == 2 and "ggml-org/ci: lacks wikitext-2-raw-v1.zip: give a folder or file" in last_line(
        result
    )


def test_without_a_network_and_a_cache_one_line_says_so(hub, text):
    result = hub.run("--model", "org/toy", "--text", text, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "org/toy: is not in the cache, and the Hub cannot be reached" in last_line(result)


def test_a_connection_that_breaks_half_way_is_resumed_or_said(hub, text):
    hub.broken.add("model-00001-of-00002.safetensors")
    result = hub.run("--model", "org/toy", "--text", text)
    assert result.returncode == 0 or "what has arrived is kept" in last_line(result), result.stderr
    assert hub.run("--model", "org/toy", "--text", text).stdout.startswith("perplexity")


def test_a_repository_without_safetensors_is_said(hub, text):
    files = hub.repositories["models/org/toy"]
    hub.repositories["models/org/toy"] = {"config.json": files["config.json"], "pytorch_model.bin": b"x"}
    result = hub.run("--model", "org/toy", "--text", text)
    assert result.returncode == 2 and "no model.safetensors in this folder" in last_line(result)


def test_a_folder_of_that_name_wins(toy, tmp_path, monkeypatch):
    shutil.copytree(toy, tmp_path / "org" / "toy")
    monkeypatch.chdir(tmp_path)
    assert model_folder(Path("org/toy")) == Path("org/toy")


ROWS = [
    "",
    " = Title = \n",
    "",
    " one\u2028line of text \n",
    " and\x85another \n",
] * 200  # as the Hub's data set has them
DOCUMENTS = [f"document {i} is here" for i in range(1100)]


@pytest.fixture
def texts(hub, tmp_path):
    """The two texts in the files of the Hub, and what they are, by name."""
    with zipfile.ZipFile(tmp_path / "wiki.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", "".join(row or " \n" for row in ROWS))
        archive.writestr("wikitext-2-raw/wiki.train.raw", "other")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS + ["beyond those that GPTQ takes"])
    hub.repositories["datasets/ggml-org/ci"] = {"wikitext-2-raw-v1.zip": (tmp_path / "wiki.zip").read_bytes()}
    hub.repositories["datasets/allenai/c4"] = {"en/c4-validation.00000-of-00008.json.gz": gzip.compress(lines.encode())}
    return {"wikitext2": "\n\n".join(ROWS), "c4": " ".join(DOCUMENTS)}


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_an_evaluation_text_by_name_has_the_tokens_of_the_joined_file(name, hub, texts, toy, tmp_path):
    (tmp_path / "joined.txt").write_text(texts[name], newline="")
    options = ["--model", toy, "--text", TINY / "train.py", "--method", "rtn", "--samples", 4, "--no-baselines"]
    tokens = []
    for text in (name, tmp_path / "joined.txt"):
        out = tmp_path / f"out{len(tokens)}"
        result = hub.run(*options, "--eval-text", text, "--out", out, program=["calibrate.py"])
        assert result.returncode == 0, result.stderr
        tokens.append(json.loads((out / "calibration.json").read_text())["inputs"]["evaluation text"])
    assert tokens[0] == tokens[1]


DAMAGES = [lambda file: file[:200], lambda file: b"no archive", lambda file: file[:-50] + bytes(50)]


@pytest.mark.parametrize("spoil", DAMAGES, ids=["cut off", "something else", "zeros at the end"])
def test_a_text_that_arrived_damaged_is_said_and_fetched_again_when_it_is_deleted(spoil, hub, texts, toy):
    for name, repository in (("wikitext2", "datasets/ggml-org/ci"), ("c4", "datasets/allenai/c4")):
        ((file, whole),) = hub.repositories[repository].items()
        hub.repositories[repository] = {file: spoil(whole)}
        result = hub.run("--model", toy, "--text", name)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert "delete it, and it is downloaded again" in last_line(result)

        hub.repositories[repository] = {file: whole}
        Path(last_line(result).removeprefix("error: ").split(": cannot be read")[0]).unlink()
        assert hub.run("--model", toy, "--text", name).stdout.startswith("perplexity")


def test_a_disk_that_fills_up_while_a_model_arrives_is_said_in_one_line(hub, text):
    """No file may grow beyond 100 kB, and the error is the one of a full disk."""
    program = (
        "import builtins, errno, eval, io, os\n"
        "class Small(io.FileIO):\n"
        "    def write(self, data):\n"
        "        if self.tell() + len(data) > 100_000: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "        return super().write(data)\n"
        "def small(file, mode='r', *more, open=open, **options):\n"
        "    is_download = str(file).endswith('.incomplete') and mode in ('wb', 'ab')\n"
        "    return Small(file, mode) if is_download else open(file, mode, *more, **options)\n"
        "builtins.open, io.open = small, small\n"
        "eval.main()"
    )
    result = hub.run("--model", "org/toy", "--text", text, program=["-c", program])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "org/toy: does not fit on the disk: make space" in last_line(result)
    assert hub.run("--model", "org/toy", "--text", text).stdout.startswith("perplexity")
