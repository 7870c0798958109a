"""Products straight from bit-planes, on every path of this machine, against float64 and against themselves."""

import itertools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from helpers import call
from products import ROOT, TYPES, assert_right, exact_weight, product

import calibrate
import eval
from experiments import kernels
from experiments.kernels import random_layer
from kernel import library, paths

GPU_PATHS = ("cuda", "fast", "readable")
WIDE = {"AVX2": ["avx2"], "AVX512": ["avx512", "avx2"]}.get(torch.backends.cpu.get_cpu_capability(), [])
WIDE += ["neon"] * (platform.machine() in ("arm64", "aarch64"))
DOORS = [*WIDE, "scalar", "emulated", *(GPU_PATHS if torch.cuda.is_available() else ())]  # through kernel.cpp
PATHS = [*DOORS, "readable on cpu", "fast on cpu"]
SHAPES = [  # out_features, in_features, group_size
    (1, 32, 32), (31, 64, 32), (31, 96, 32), (33, 576, 64), (40, 192, 96), (40, 576, 192), (1000, 64, 64),
    (1000, 576, -1), (64, 1536, 128), (33, 1536, 128), (32, 1536, -1), (40, 768, 384), (32, 4096, 128), (1, 4096, -1),
    (70, 4096, -1),
]  # fmt: skip
CASES = [(out, width, n_bits, size) for n_bits, (out, width, size) in itertools.product(range(1, 9), SHAPES)]
ODD = [(40, 1536, 3, 64), (40, 1536, 3, 128), (40, 1536, 4, 768)]  # out_features, in_features, n_bits, group_size


@pytest.fixture
def path(request) -> str:
    name = request.param
    if not name.endswith(" on cpu") and name not in paths("cuda" if name in GPU_PATHS else "cpu"):
        pytest.skip(f"no compiler here makes {name}")
    return name


def on_every_path(cases):
    """Run a test for each path with each case that it takes: the fast kernel, 1 to 4 bits in groups of 128, 256, .."""

    def takes(path, out_features, in_features, n_bits, group_size):
        size = in_features if group_size == -1 else group_size
        return not path.startswith("fast") or (n_bits <= 4 and size % 128 == 0)

    pairs = [(path, case) for path in PATHS for case in cases if takes(path, *case)]
    names = [f"{path}-{'-'.join(map(str, case))}" for path, case in pairs]
    return pytest.mark.parametrize("path, case", pairs, indirect=["path"], ids=names)


def types(path):
    """The dtypes that a path takes."""
    return TYPES[path.startswith("fast") :]


def random_case(path, out_features, in_features, n_bits, group_size, batch, dtype=torch.float16):
    """A layer and an input on the device of the path."""
    torch.manual_seed(out_features * 10 + batch)
    device = "cuda" if path in GPU_PATHS else "cpu"
    layer = random_layer(out_features, in_features, n_bits, group_size, device)
    layer.alpha /= 8  # so that no product is beyond fp16
    layer.shift /= 8
    return layer, torch.randn(batch, in_features, device=device).to(dtype)


@on_every_path(CASES)
def test_product_is_that_of_the_bits_in_every_dtype(path, case):
    out_features, in_features, n_bits, _ = case
    batch = 1 + (n_bits + in_features // 32 + out_features) % 8
    for dtype in types(path):
        layer, x = random_case(path, *case, batch, dtype)
        y = product(layer, x, path)
        assert y.dtype == dtype
        assert_right(y, layer, x)


@on_every_path([(40, 96, 8, 32), (40, 96, 3, 32), (40, 256, 3, 128), (40, 256, 4, 128)])
def test_unit_vectors_read_out_the_weight(path, case):
    layer, _ = random_case(path, *case, 8)
    columns = torch.eye(case[1], device=layer.shift.device, dtype=torch.float16)
    weight = torch.cat([product(layer, part, path) for part in columns.split(8)]).T
    torch.testing.assert_close(weight.double(), exact_weight(layer), rtol=1e-3, atol=1e-6)


@on_every_path(ODD)
def test_an_outlier_in_x_costs_no_more_than_its_own_rounding(path, case):
    for dtype in types(path):
        layer, x = random_case(path, *case, 4, dtype)
        x[:2, 77] = 1e4
        assert_right(product(layer, x, path), layer, x)


@on_every_path(ODD)
def test_x_times_a_power_of_two_gives_y_times_that_power(path, case):
    layer, x = random_case(path, *case, 2, torch.bfloat16)
    for power in (2.0**-60, 2.0**60):
        assert torch.equal(product(layer, x * power, path), product(layer, x, path) * power)


@on_every_path(ODD)
def test_zeros_give_zero_and_nan_stays_in_its_row(path, case):
    layer, x = random_case(path, *case, 3)
    x[[0, 2]], x[1, 5] = 0, torch.nan
    y = product(layer, x, path)
    assert (y[[0, 2]] == 0).all() and y[1].isnan().all()


@on_every_path([*ODD, (250, 1536, 3, 128)])
def test_runs_agree_to_the_last_bit_and_so_does_a_row_alone(path, case):
    layer, x = random_case(path, *case, 8)
    rows = torch.cat([product(layer, row[None], path) for row in x])
    for batch in range(1, 9):
        assert torch.equal(product(layer, x[:batch], path), rows[:batch])
    assert torch.equal(product(layer, x, path), product(layer, x, path))


@pytest.mark.parametrize("path", DOORS, indirect=True)
def test_strided_x_gives_the_same_as_contiguous(path):
    layer, x = random_case(path, 96, 1536, 3, 128, 8)
    wide = torch.stack((x, torch.full_like(x, torch.nan)), dim=2)
    assert torch.equal(product(layer, wide[..., 0], path), product(layer, x, path))


@pytest.mark.parametrize("path", DOORS, indirect=True)
def test_a_later_call_leaves_an_earlier_result_alone(path):
    layer, x = random_case(path, 96, 1536, 3, 128, 2)
    y = product(layer, x, path)
    kept = y.clone()
    product(layer, 2 * x, path)
    assert torch.equal(y, kept)


@pytest.mark.parametrize("path", [*WIDE, "scalar", "emulated"], indirect=True)
@pytest.mark.parametrize("tokens", (9, 32, 33, 40))
def test_a_cpu_takes_any_number_of_tokens(path, tokens):
    for dtype in TYPES:
        layer, x = random_case(path, 250, 576, 3, 64, tokens, dtype)
        y = product(layer, x.view(tokens, 1, -1), path)
        assert y.shape == (tokens, 1, 250) and y.dtype == dtype
        # many tokens in bfloat16 are multiplied by weights in bfloat16
        expected, size = x.double() @ exact_weight(layer).T, x.double().abs() @ exact_weight(layer).abs().T
        assert ((y.flatten(0, 1) - expected).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-6 * size).all()


@pytest.mark.parametrize("path", [*WIDE, "scalar", "emulated"], indirect=True)
@pytest.mark.parametrize("case", [case for case in CASES if case[1] in (64, 576)], ids=str)
def test_many_unit_vectors_read_out_exactly_the_dequantized_weight(path, case):
    layer, _ = random_case(path, *case, 1)
    assert torch.equal(product(layer, torch.eye(case[1]), path).T, layer.dequantize())


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_number_of_threads_changes_nothing(threads):
    layer, x = random_case("cpu", 1000, 576, 3, 64, 2, torch.float32)
    expected, before = layer(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    found = layer(x)
    torch.set_num_threads(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("batch", (0, 1, 8, 9, 33))
def test_forward_agrees_with_the_dequantized_weight_for_any_number_of_tokens(batch):
    layer, x = random_case("cpu", 70, 576, 3, 64, batch, torch.float32)
    assert layer(x.view(batch, 1, 576)).shape == (batch, 1, 70)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-3)


def test_gradients_with_respect_to_x_are_those_of_the_dequantized_weight():
    layer, x = random_case("cpu", 64, 96, 3, 32, 2, torch.float32)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, -1))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(2, 64)), "x has 64 columns, the bit-planes have 96"),
        (dict(x=torch.ones(2, 96, dtype=torch.int32)), "x is Int"),
        (dict(x=torch.randn(0, 96)), "0 rows of x"),
        (dict(bit_planes=torch.zeros(3, 3, 3, 32, dtype=torch.int32)), "hold 3 tiles of 32 rows, 40 rows need 2"),
        (dict(bit_planes=torch.zeros(9, 2, 3, 32, dtype=torch.int32)), "9 bit-planes"),
        (dict(bit_planes=torch.zeros(3, 2, 3, 32)), "are Float, Half, Half, expected int32"),
        (dict(alpha=torch.zeros(2, 2, 3, 32).half()), r"alpha is \[2, 2, 3, 32\], expected \[3, 2, 3, 32\]"),
        (dict(alpha=torch.zeros(3, 2, 2, 32).half()), "2 groups do not divide 3 words"),
        (dict(shift=torch.zeros(2, 1, 32).half()), r"shift is \[2, 1, 32\], expected \[2, 3, 32\]"),
        (dict(shift=torch.zeros(2, 3, 32)), "are Int, Half, Float, expected int32"),
        (dict(shift=torch.zeros(2, 32, 3).half().mT), "must be contiguous"),
        (dict(path="abacus"), "no path called abacus"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    if library() is None:
        pytest.skip("no compiler")
    layer = random_layer(40, 96, 3, 32)
    given = dict(x=torch.randn(2, 96), bit_planes=layer.bit_planes, alpha=layer.alpha, shift=layer.shift)
    given |= dict(out_features=40, path="scalar") | change
    with pytest.raises(ValueError, match=message):
        torch.ops.flexbcq.multiply(*given.values())


def test_an_x_of_another_width_is_refused_by_the_layer():
    with pytest.raises(ValueError, match="x has 64 columns, the weight has in_features 96"):
        random_layer(40, 96, 3, 32)(torch.randn(2, 64))


@pytest.fixture
def afresh():
    """What the machine offers is found out again, in this test and after it."""
    yield
    paths.cache_clear()


def test_an_environment_variable_forces_a_path(afresh, monkeypatch):
    for name in ("torch", "scalar") if library() else ("torch",):
        monkeypatch.setenv("FLEXBCQ_KERNEL", name)
        paths.cache_clear()
        assert paths("cpu") == [name]
    for name, message in (("abacus", "no such kernel; there are cuda"), ("readable", "this machine offers .*torch")):
        monkeypatch.setenv("FLEXBCQ_KERNEL", name)
        paths.cache_clear()
        with pytest.raises(ValueError, match=f"FLEXBCQ_KERNEL={name}: {message}"):
            paths("cpu")


def test_an_unknown_kernel_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setenv("FLEXBCQ_KERNEL", "abacus")
    for program in (calibrate, eval):
        result = call(program.main)
        assert result.code == 2 and "FLEXBCQ_KERNEL=abacus: no such kernel" in result.err.strip().splitlines()[-1]


def in_a_process(folder, code="print(kernel.paths('cpu'))", **environment):
    """Run code in a fresh process whose compiled kernels are kept in `folder` alone."""
    start = f"import kernel, pathlib; kernel.FOLDERS = [pathlib.Path({str(folder)!r})] * 2; "
    run = [sys.executable, "-c", start + code]
    return subprocess.run(run, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def fake_compiler(tmp_path):
    """Write a program that stands in for a compiler. Returns its path."""

    def write(line):
        compiler = tmp_path / "c++"
        compiler.write_text(f"#!/bin/sh\n{line}\n")
        compiler.chmod(0o755)
        return str(compiler)

    return write


def test_what_a_compiler_complains_of_is_said(fake_compiler, tmp_path):
    broken = fake_compiler("for x; do [ $x = -c ] && echo 'a.cpp:1: error: not today' && exit 1; done; c++ \"$@\"")
    result = in_a_process(tmp_path, CXX=broken)
    assert result.stdout == "['torch']\n"
    assert result.stderr.endswith("no compiled kernels (a.cpp:1: error: not today): on with plain PyTorch\n")


def test_without_a_compiler_one_line_is_said_and_plain_pytorch_runs(tmp_path):
    code = "import torch; print(kernel.paths('cpu'), kernel.BCQLinear(32, 40, 3)(torch.ones(2, 32)).shape)"
    result = in_a_process(tmp_path, code, CXX="no-such-compiler")
    assert result.stdout == "['torch'] torch.Size([2, 40])\n"
    said = "no C++ compiler no-such-compiler is installed"
    assert result.stderr == f"no compiled kernels ({said}): on with plain PyTorch\n"


def test_kernels_are_compiled_once_by_either_compiler_and_used_without_one(tmp_path):
    for compiler in ("g++", "clang++"):
        if shutil.which(compiler) is None:
            pytest.skip(f"no {compiler} here")
        folder = tmp_path / compiler
        folder.mkdir()
        first = in_a_process(folder, CXX=compiler)
        assert first.stdout == f"{paths('cpu')}\n" and "compiling" in first.stderr and "warning" not in first.stderr
        again = in_a_process(folder, CXX="no-such-compiler", PATH="/nowhere")
        assert again.stdout == first.stdout and again.stderr == ""
        assert sorted(path.suffix for path in folder.iterdir()) in (["", ".so"], [".so"])


def test_a_source_that_changed_is_compiled_again(tmp_path):
    names = []
    for text in ("", "// another comment\n"):
        copy = tmp_path / f"copy{len(names)}"
        shutil.copytree(ROOT / "support" / "cpu", copy / "support" / "cpu")
        (copy / "kernel.cpp").write_text((ROOT / "kernel.cpp").read_text() + text)
        run = in_a_process(tmp_path, f"kernel.HERE = pathlib.Path({str(copy)!r}); print(kernel.compiled_name(False))")
        names.append(run.stdout)
    assert names[0].startswith("flexbcq_kernel-") and names[0] != names[1]


# ------------------------------------------------------------------------------------- as an operator of PyTorch


@pytest.fixture(params=(3, 40), ids=("few", "many"))
def layer_and_x(request):
    return random_case("cpu", 70, 576, 3, 64, request.param, torch.float32)


def test_the_product_is_an_operator_with_a_shape_and_a_gradient(layer_and_x):
    assert library() is not None
    layer, x = layer_and_x
    arguments = x.requires_grad_(), layer.bit_planes, layer.alpha, layer.shift, 70, "scalar"
    checks = torch.library.opcheck(torch.ops.flexbcq.multiply.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}
    torch.ops.flexbcq.multiply(*arguments).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(len(x), -1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_and_export_see_the_product(layer_and_x):
    layer, x = layer_and_x
    for graph in (torch.jit.trace(layer, x), torch.export.export(layer, (x,)).module()):
        y = graph(2 * x)
        torch.testing.assert_close(y, layer(2 * x))


def test_a_tangent_is_not_lost(layer_and_x):
    layer, x = layer_and_x
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, torch.ones_like(x) @ layer.dequantize().T)


def test_torch_compile_captures_a_layer_whole(layer_and_x):
    layer, x = layer_and_x
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_a_layer_moved_to_a_dtype_keeps_its_stored_numbers(layer_and_x, dtype):
    layer, x = layer_and_x
    expected = layer(x.to(dtype))
    layer.to(dtype)
    assert layer.alpha.dtype == layer.shift.dtype == torch.float16 and torch.equal(layer(x.to(dtype)), expected)


def test_autocast_decides_the_dtype_as_for_a_linear_layer(layer_and_x):
    layer, x = layer_and_x
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == F.linear(x, layer.dequantize()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8))
def test_whole_numbers_are_refused(layer_and_x, dtype):
    layer, x = layer_and_x
    with pytest.raises(ValueError, match="needs floating-point numbers"):
        layer(x.to(dtype))


@pytest.mark.parametrize("path", [*WIDE, "scalar", "emulated"], indirect=True)
def test_small_scales_survive_where_denormals_are_flushed(path):
    layer, x = random_case(path, 64, 64, 4, 32, 2, torch.float32)
    layer.alpha *= 1e-4
    layer.shift *= 1e-4
    expected = x.double() @ exact_weight(layer).T
    torch.set_flush_denormal(True)
    y = product(layer, x, path)
    torch.set_flush_denormal(False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ the rest


def test_benchmark_writes_its_table_and_its_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "CACHE", 1e6)  # with fewer copies of the layer
    result = call(kernels.main, "--shapes", "64x128", "--bits", 3, "--batch", 1, "--rounds", 2, "--out", tmp_path / "b")
    assert result.code == 0 and "| 64 x 128 | 3 | 1 |" in result.out
    assert (tmp_path / "b.md").read_text() == result.out[:-1] and (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "compiler, emulator, fastest",
    [("g++", [], None), ("clang++", [], None), ("aarch64-linux-gnu-g++", ["qemu-aarch64"], "neon")],
    ids=("g++", "clang++", "arm"),
)
def test_any_compiler_and_processor_agrees_with_float64_without_a_warning(compiler, emulator, fastest, tmp_path):
    for tool in [compiler, *emulator]:
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    source = Path(__file__).with_name("kernel_alone.cpp")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"] + ["-static"] * len(emulator)
    subprocess.run([compiler, *flags, source, "-o", tmp_path / "alone"], check=True)
    result = subprocess.run([*emulator, tmp_path / "alone"], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, [line for line in lines if not line.startswith("good")]
    assert lines[0].startswith(f"good {fastest or paths('cpu')[0]} ")


def test_sanitizers_have_nothing_to_say(tmp_path):
    """Every CPU path on odd shapes, compiled so that reads past an end and undefined behaviour abort the process."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    source, program = Path(__file__).with_name("kernel_alone.cpp"), tmp_path / "alone"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, source, "-o", program], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr[-2000:]
