"""What Windows and macOS lack is not needed; who imports whom, who knows the command line, and what the root holds."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import FEW_STEPS, blocks_finished, call, contents

import calibrate
import eval

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("support", "experiments", "models")
PROGRAMS = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


def elsewhere(*arguments) -> subprocess.Popen:
    """Start a program without `fcntl`, `resource`, `os.posix_fallocate`, .. and with folders that cannot be synced."""
    command = [sys.executable, Path(__file__).with_name("elsewhere.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(toy, text, tmp_path_factory):
    """What a run here gives that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert call(calibrate.main, "--model", toy, "--text", text, "--out", out, *FEW_STEPS).code == 0
    return out


@pytest.mark.parametrize("kind", ["in memory", "offloaded"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_run_that_ends_early_is_resumed_and_gives_the_same_bytes(end, kind, whole, toy, text, tmp_path):
    command = ["calibrate.py", "--model", toy, "--text", text, "--out", tmp_path / "out", *FEW_STEPS]
    if kind == "offloaded":
        (tmp_path / "disk").mkdir()
        command += ["--offload", tmp_path / "disk"]

    with elsewhere(*command) as first:
        while first.poll() is None and blocks_finished(tmp_path / "out") < 1:
            time.sleep(0.005)
        first.send_signal(end)
        said = first.communicate()[1]
    assert first.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[end], said

    with elsewhere(*command) as second:
        said = second.communicate()[1]
    assert second.returncode == 0 and "block 2/2" in said and "block 1/2" not in said, said
    assert contents(tmp_path / "out") == contents(whole)
    assert {path.name for path in tmp_path.rglob("*") if path.parent == tmp_path} <= {"out", "disk"}


def test_eval_says_the_same(whole, text):
    command = ["--model", whole, "--text", text, "--seq-len", 50]
    with elsewhere("eval.py", *command) as there:
        assert there.communicate()[0] == call(eval.main, *command).out


@pytest.fixture
def compiler(tmp_path):
    """A compiler that does not know OpenMP, as Apple's."""
    path = tmp_path / "c++"
    refuse = '[ "$x" = -fopenmp ] && echo "error: unsupported option -fopenmp" >&2 && exit 1'
    path.write_text(f'#!/bin/sh\nfor x; do {refuse}; done\nexec c++ "$@"\n')
    path.chmod(0o755)
    return path


PRODUCT = """
import sys
from pathlib import Path
import torch
import kernel
from experiments.kernels import random_layer
kernel.FOLDERS = [Path(sys.argv[1])] * 2
layer, x = random_layer(40, 96, 3, 32), torch.randn(2, 96)
torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-3)
print(*kernel.paths("cpu"))
"""


def test_kernels_are_built_and_right_without_openmp(compiler, tmp_path):
    environment = os.environ | {"CXX": str(compiler)}
    command = [sys.executable, "-c", PRODUCT, tmp_path / "build"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "no compiled kernels" not in result.stderr, result.stderr
    assert "scalar" in result.stdout.split()


# ------------------------------------------------------------------------------------------------------ the layout


def imports(node: ast.AST) -> set[str]:
    """First names of the modules that the `import` statements below a node name."""
    names = [alias.name for n in ast.walk(node) if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def at_import(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run when a module is imported."""
    return [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_needs_at_import_what_windows_lacks(path):
    needed = set().union(*map(imports, at_import(parse(path))))
    assert not needed & {"fcntl", "resource", "termios", "pwd", "grp"}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_run_and_main_know_the_command_line(path):
    for function in ast.walk(parse(path)):
        if isinstance(function, ast.FunctionDef) and function.name not in ("run", "main"):
            arguments = function.args
            named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            assert "args" not in named, function.name


def test_nobody_forges_options():
    texts = {path: path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)}
    texts[ROOT / "tutorial.ipynb"] = (ROOT / "tutorial.ipynb").read_text("utf-8")
    for path, text in texts.items():
        assert "SimpleNamespace" not in text and "argparse.Namespace" not in text, path


@pytest.mark.parametrize("name", ["flexbcq.py", "kernel.py", "llama.py"])
def test_method_kernels_and_model_need_nothing_of_the_rest(name):
    assert not imports(parse(ROOT / name)) & {"support", "experiments", "calibrate", "eval", "models"}


def test_the_root_holds_nothing_but_what_is_listed_here():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    code = {"flexbcq.py", "kernel.py", "kernel.cu", "kernel.cpp", "llama.py", "calibrate.py", "eval.py"}
    words = {"tutorial.ipynb", "README.md", "RESULTS.md", "LICENSE", "CITATION.cff"}
    setup = {"requirements.txt", "requirements-dev.txt", "constraints.txt", "pyproject.toml"}
    folders = {"support", "experiments", "docs", "models", "tests"}
    root = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert code <= root and root <= code | words | setup | folders
