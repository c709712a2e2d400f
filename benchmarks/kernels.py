"""Every operator of litvae.kernels against eager PyTorch and torch.compile, and the ladder of a whole GENESIS step.

    python benchmarks/kernels.py [--rounds 20] [--small] [--no-compile] [--out FILE.json]

Forward and backward, float32, candidates interleaved. On a GPU: CUDA events around each call, the L2 cache flushed in
between, and beside the ratio the bytes that the kernels move a second over the measured bandwidth of a copy. On a CPU:
one thread and CPU seconds; only operators with a form in C++ (`make kernels` builds it) can differ from eager there.
"""
import argparse, json, statistics, time

import torch

from litvae.core.environment import hardware
from litvae.core.objectives import geco_for_images
from litvae.core.training import Task, Trainer
from litvae.genesis.model import Genesis
from litvae.kernels import bn_glu, crop, laplace_iwae, log_mean_exp_normal, mixture_nll, paste, stick_breaking
from litvae.kernels.compiling import cuda_problem, launches
from litvae.kernels.ops import describe_backend, use_backend


def workloads(device, small):
    "name -> (function, tensors that need a gradient)."
    b, s, k = (8, 32, 16) if small else (256, 64, 64)
    rand = lambda *shape: torch.rand(*shape, device=device)
    boxes = lambda *shape: torch.cat([rand(*shape, 2) * 0.2 + 0.1, rand(*shape, 2) * 1.6 - 0.8], -1)
    few, side = max(b // 8, 2), 2 * s
    return {
        "mixture likelihood, K = 5": (lambda m, l, x=rand(b, 3, s, s): mixture_nll(x, m, l, 0.7),
                                      [rand(b, 5, 3, s, s), torch.log_softmax(rand(b, 5, 1, s, s), 1)]),
        "stick breaking, K = 5": (stick_breaking, [rand(b, 5, 1, s, s)]),
        "batch norm and gate": (lambda x, w, c, mean=rand(64), variance=rand(64): bn_glu(x, w, c, mean, variance),
                                [rand(b, 64, s, s), rand(64), rand(64)]),
        f"paste, K = {k}": (lambda g, a, o, n: paste(g, a, o, n, (side, side))[0],
                            [rand(few, k, 3, 16, 16), rand(few, k, 1, 16, 16), boxes(few, k), rand(few, k)]),
        f"crop, K = {k}": (lambda i, o: crop(i, o, (16, 16)), [rand(few, 3, side, side), boxes(few, k)]),
        "log-mean-exp, 1000 components": (log_mean_exp_normal, [rand(4 * b, 64), rand(1000, 64), rand(1000, 64) + 0.5]),
        "Laplace IWAE, S = 30": (laplace_iwae, [rand(b, 3 * s * s // 4), rand(30, b, 3 * s * s // 4), rand(30, b)])}


def both_ways(function, tensors):
    inputs = [t.detach().requires_grad_() for t in tensors]
    value = function(*inputs)
    return lambda: torch.autograd.grad(function(*inputs), inputs, torch.ones_like(value))


class Clock:
    "Seconds of one call: CUDA events with a flushed cache, or CPU seconds of this process."
    def __init__(self, device):
        self.cuda = device == "cuda"
        if self.cuda: self.flush = torch.empty(2 ** 28, dtype=torch.uint8, device=device)

    def __call__(self, call):
        if not self.cuda:
            start = time.process_time()
            call()
            return time.process_time() - start
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copy_bandwidth(clock, device):
    "Bytes a second that a copy reads and writes."
    a = torch.empty(2 ** (29 if clock.cuda else 27), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(clock(lambda: b.copy_(a)) for _ in range(10))


def interleaved(candidates, clock, rounds):
    "name -> (min, median) of the seconds of each call."
    for call in candidates.values():
        for _ in range(3): call()
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items(): times[name].append(clock(call))
    return {name: (min(t), statistics.median(t)) for name, t in times.items()}


def with_backend(name, call):
    def run():
        with use_backend(name): return call()
    return run


def operators(args, device, clock):
    rows, bandwidth = [], copy_bandwidth(clock, device)
    print(f"copy: {bandwidth / 1e9:,.0f} GB/s\n\n| operator | eager / ours: min | median | compiled / ours: min "
          "| bytes moved a second, share of a copy |\n|---|---:|---:|---:|---:|")
    for name, (function, tensors) in workloads(device, args.small).items():
        candidates = {"ours": both_ways(function, tensors)}
        with use_backend("reference"):
            candidates["eager"] = with_backend("reference", both_ways(function, tensors))
            if not args.no_compile:
                candidates["compiled"] = with_backend("reference", both_ways(torch.compile(function), tensors))
        with launches() as log: candidates["ours"]()
        found = interleaved(candidates, clock, args.rounds)
        ours, moved = found["ours"], sum(size for *_, size in log)
        row = {"operator": name, "eager": found["eager"][0] / ours[0], "median": found["eager"][1] / ours[1],
               "compiled": found["compiled"][0] / ours[0] if "compiled" in found else None,
               "bandwidth": moved / ours[0] / bandwidth if moved else None}
        rows.append(row)
        show = lambda key, form: "-" if row[key] is None else format(row[key], form)
        print(f"| {name} | {row['eager']:.2f} | {row['median']:.2f} | {show('compiled', '.2f')} "
              f"| {show('bandwidth', '.0%')} |", flush=True)
    return rows


class Random(Task):
    "GENESIS on noise that lies on the device."
    def __init__(self, images, kind):
        super().__init__(Genesis(kind, 5, size=images.shape[-1]), geco_for_images(images.shape[-1]), images)
    def batch(self, indices): return self.train_data[: len(indices)]


def ladder(args, device, clock):
    "A whole step, from plain fp32 upwards; each rung beside the first, interleaved."
    size, count = (32, 4) if args.small else (64, 32)
    rungs = {"fp32, references": ("fp32", "reference", False), "fp32, kernels": ("fp32", "auto", False)}
    if device == "cuda": rungs |= {"TF32, references": ("tf32", "reference", False),
                                   "TF32, kernels": ("tf32", "auto", False), "bf16, kernels": ("bf16", "auto", False)}
    if device == "cuda" and not args.no_compile:
        rungs |= {"TF32, kernels, graphs": ("tf32", "auto", True), "bf16, kernels, graphs": ("bf16", "auto", True)}
    rows = []
    for kind in ("asymmetric", "symmetric"):
        candidates = {}
        for name, (precision, backend, compiled) in rungs.items():
            torch.manual_seed(0)
            task = Random(torch.rand(count, 3, size, size, device=device), kind).to(device).train()
            trainer = Trainer(task, 1e-4, count, precision=precision, compiled=compiled)
            def step(trainer=trainer):
                trainer.gradient(0)
                trainer.optimisers["model"].step()
            candidates[name] = with_backend(backend, step)
        found = interleaved(candidates, clock, args.rounds)
        print(f"\n| GENESIS {kind}, {size}x{size}, 5 slots, batch {count} | plain / this: min | median |")
        print("|---|---:|---:|")
        for name, (least, middle) in found.items():
            plain = found["fp32, references"]
            rows.append({"model": kind, "rung": name, "min": plain[0] / least, "median": plain[1] / middle})
            print(f"| {name} | {plain[0] / least:.2f} | {plain[1] / middle:.2f} |", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", help="write the numbers to this JSON file as well")
    args = parser.parse_args()
    device = "cuda" if cuda_problem() is None else "cpu"
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    print(f"{hardware()}, torch {torch.__version__}; operators on this device: {describe_backend(device)}")
    clock = Clock(device)
    found = {"hardware": hardware(), "torch": str(torch.__version__), "operators": operators(args, device, clock),
             "ladder": ladder(args, device, clock)}
    if args.out:
        with open(args.out, "w", encoding="utf-8") as f: json.dump(found, f, indent=1)


if __name__ == "__main__": main()
