"""The operators of litvae.kernels: compiled for three generations of GPUs, run on the CPU, and on a GPU where there is
one. Nothing but the tests marked `gpu` needs a GPU."""
import os, re, shutil, subprocess, sys
from pathlib import Path

import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_cases import OPERATORS, cases, run, worst
from litvae.core.files import LitvaeError
from litvae.kernels import compiling
from litvae.kernels.compiling import compile_kernel, cuda_problem
from litvae.kernels.emulation import Emulator, cpp_compiler
from litvae.kernels.ops import describe_backend, use_backend
from litvae.kernels.sources import source

GENERATIONS = (80, 90, 100)
FILES = sorted({op.file for op in OPERATORS.values()})
CASES = cases()
needs_compiler = pytest.mark.skipif(not cpp_compiler(), reason="no C++ compiler on this machine")
gpu = [pytest.mark.gpu, pytest.mark.skipif(cuda_problem() is not None, reason=cuda_problem() or "")]


def instances(file):
    return sorted({name for op in OPERATORS.values() if op.file == file for name in op.instances})


@pytest.mark.skipif(not torch.version.cuda, reason="this PyTorch was built without CUDA")
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_compiles(file, tmp_path):
    "All for one generation, the first for each; `nvcc` below takes all for all."
    assert instances(file), f"no operator names the kernels of {file}"
    text = source("common.cu") + source(file)
    for name in instances(file): assert compile_kernel(text, name, 90, tmp_path)[1]
    for generation in GENERATIONS: assert compile_kernel(text, instances(file)[0], generation, tmp_path)[1]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on this machine")
@pytest.mark.parametrize("file", FILES)
def test_no_kernel_spills_registers_in_three_generations(file, tmp_path):
    kept = ", ".join(f"(void*)&{name}" for name in instances(file))
    text = f"{source('common.cu')}{source(file)}\nvoid* kept[] = {{{kept}}};\n"
    (tmp_path / "all.cu").write_text(text)
    codes = [f"-gencode=arch=compute_{g},code=sm_{g}" for g in GENERATIONS]
    command = ["nvcc", "-std=c++17", "-fatbin", *codes, "-Xptxas", "-v", "-o", str(tmp_path / "all.fatbin"),
               str(tmp_path / "all.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == len(instances(file)) * len(GENERATIONS) and set(spills) == {("0", "0")}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_emulated_kernels_agree_with_the_reference(name):
    with use_backend("reference"): expected = run(CASES[name])
    with use_backend("emulated"): found = run(CASES[name])
    assert worst(found, expected) < 2e-5
    assert all(t.isfinite().all() for t in found)


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_layout_does_not_matter(name):
    "Inputs whose memory lies in another order."
    function, tensors, others = CASES[name]
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    with use_backend("reference"): expected = run(CASES[name])
    with use_backend("emulated"): assert worst(run((function, turned, others)), expected) < 2e-5


@needs_compiler
@pytest.mark.parametrize("order", ["reverse", "interleaved"])
def test_the_order_of_threads_does_not_matter(order):
    "Bit for bit: a kernel that lacks a barrier, or adds in an order that nobody fixed, is found here."
    kept = {name: op.kernels.get("emulated") for name, op in OPERATORS.items()}
    try:
        with use_backend("emulated"):
            forward = {name: run(case) for name, case in CASES.items()}
            for op in OPERATORS.values(): op.kernels["emulated"] = Emulator(op.file, order)
            for name, case in CASES.items():
                assert all(torch.equal(a, b) for a, b in zip(run(case), forward[name])), name
    finally:
        for name, op in OPERATORS.items():
            op.kernels.pop("emulated")
            if kept[name] is not None: op.kernels["emulated"] = kept[name]


@needs_compiler
def test_kernels_are_clean_under_sanitizers():
    asked = subprocess.run([cpp_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    asan = asked.stdout.strip()
    if not Path(asan).is_file(): pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
                                "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("kernel_cases.py"))], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]


class Recorder(TorchDispatchMode):
    "Keeps one call of each operator of this package."
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "litvae": self.calls.setdefault(function, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@needs_compiler
def test_opcheck_passes_for_every_operator():
    with use_backend("emulated"), Recorder() as recorder:
        for case in CASES.values(): run(case)
    assert {function._schema.name.split("::")[1] for function in recorder.calls} == set(OPERATORS)
    for function, (args, kwargs) in recorder.calls.items():
        gradient = "backward" not in str(function)                    # a gradient has none of its own
        args = [a.detach().requires_grad_(a.requires_grad and gradient) if isinstance(a, torch.Tensor) else a
                for a in args]
        torch.library.opcheck(function, args, kwargs)


@needs_compiler
@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("name", CASES)
def test_the_compiler_takes_it_in_one_piece(name, backend):
    function, tensors, others = CASES[name]
    torch.compiler.reset()
    with use_backend(backend):
        compiled = torch.compile(lambda *inputs: function(*inputs, **others), backend="aot_eager", fullgraph=True)
        assert worst(run((compiled, tensors, {})), run(CASES[name])) < 2e-5


def test_importing_touches_no_gpu_and_compiles_nothing(tmp_path):
    code = "import litvae.kernels, litvae.genesis, litvae.meme, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir()), "something was compiled"


def test_a_torch_that_cannot_compile_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.cuda._utils", None)
    with pytest.raises(LitvaeError, match="torch 2.11 can"): compiling._nvrtc("", "none", 90)


def test_the_switch_is_said(monkeypatch):
    with use_backend("reference"): assert describe_backend("cuda") == "reference (asked for)"
    done = subprocess.run([sys.executable, "-c", "from litvae.kernels.ops import describe_backend as d; print(d())"],
                          env=os.environ | {"LITVAE_KERNELS": "emulated"}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "emulated (asked for)"
    wrong = subprocess.run([sys.executable, "-c", "import litvae.kernels"], env=os.environ | {"LITVAE_KERNELS": "fast"},
                           capture_output=True, text=True)
    assert "unknown backend 'fast'" in wrong.stderr


def on_gpu(test):
    for mark in gpu: test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_agree_with_the_reference(name):
    with use_backend("reference"): expected = run(CASES[name])
    found = run(CASES[name], "cuda")
    assert worst(found, expected) < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(found, run(CASES[name], "cuda"))), "a repeat gives other bits"


@on_gpu
def test_glimpses_take_no_memory_of_the_size_of_repeated_images():
    from litvae.kernels.crop import crop
    images, boxes = torch.rand(8, 3, 128, 128, device="cuda"), torch.rand(8, 64, 4, device="cuda")
    crop(images, boxes, (16, 16))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    crop(images, boxes, (16, 16))
    assert torch.cuda.max_memory_allocated() - before < 2 * 8 * 64 * 3 * 16 * 16 * 4
