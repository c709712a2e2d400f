"""What the benchmarks share: a training step in two forms, one check that they agree, CPU seconds, memory, and their
comparison."""
import copy, statistics, time

import torch
from torch.utils.flop_counter import FlopCounterMode

from litvae.kernels.counting import KernelCounter, saved_bytes


class Step:
    """A training step of a copy of `model` on the batch `x`: its own loss and the fused Adam, or, where there is a
    `plain_loss(model, x, objective)`, that one and Adam tensor by tensor. `adam`: further arguments of Adam."""
    def __init__(self, model, x, objective, plain_loss=None, **adam):
        self.model, self.x, self.objective, self.plain_loss = copy.deepcopy(model), x, objective, plain_loss
        form = dict(foreach=False) if plain_loss else dict(fused=True)
        self.adam = torch.optim.Adam(self.model.parameters(), **{"lr": 1e-4} | adam | form)

    def loss(self):
        if self.plain_loss: return self.plain_loss(self.model, self.x, self.objective)
        return self.model.loss(self.x, self.objective).total

    def __call__(self, bf16=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): loss = self.loss()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


def same_loss_and_gradients(make, bound):
    """The largest difference of loss and gradients between the steps `make(False)` and `make(True)`, with one noise
    for both, relative to the largest number of each; fails beyond `bound`."""
    found = []
    for plain in (False, True):
        step = make(plain)
        torch.manual_seed(0)
        loss = step.loss()
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in step.model.parameters()])
    worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(*found))
    assert worst < bound, f"the two forms differ by {worst:.1e}"
    return worst


def resident(field):
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def peak_growth(step):
    "Bytes by which the resident memory of the process grew at most during a step (Linux), None elsewhere."
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f: f.write("5")  # forgets the old peak
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before
    except OSError: return None


def timed(call):
    started = time.process_time()
    call()
    return time.process_time() - started


def compare(steps, rounds):
    "Run the steps `ours` and `plain` in turns, with a matrix product between them, and print what each took."
    for step in steps.values(): step()                                                # warm-up
    memory = {name: (saved_bytes(step.loss, step.model.parameters()), peak_growth(step))
              for name, step in steps.items()}
    flops, kernels = {}, {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter: step()
        with KernelCounter() as mode: step()
        flops[name], kernels[name] = counter.get_total_flops(), mode.count
    a, b, times = torch.randn(1024, 1024), torch.randn(1024, 1024), {"ours": [], "plain": [], "sgemm": []}
    for _ in range(rounds):
        for name, step in steps.items():
            times["sgemm"].append(timed(lambda: [a @ b for _ in range(10)]) / 10)
            times[name].append(timed(step))
    report(times, flops, kernels, memory)


def report(times, flops, kernels, memory):
    product = 2 * 1024 ** 3
    pick = {"min": min, "median": statistics.median}
    for name in ("ours", "plain"):
        cpu = ", ".join(f"{f(times[name]):.3f} ({word})" for word, f in pick.items())
        size = ", ".join("-" if n is None else f"{n / 2**20:.0f} MiB" for n in memory[name])
        print(f"{name}: CPU s {cpu}; {flops[name] / 1e9:.1f} GFLOP; {kernels[name]} kernels; "
              f"saved for backward, growth of memory: {size}")
    for word, f in pick.items():
        rate, ours = product / f(times["sgemm"]), f(times["ours"])
        print(f"{word}: plain / ours {f(times['plain']) / ours:.2f}; sgemm {rate / 1e9:.0f} GFLOP/s, of which the step "
              f"reaches {flops['ours'] / ours / rate:.0%}; sgemm-bound {flops['ours'] / rate:.3f} s, "
              f"the step takes {ours * rate / flops['ours']:.2f} times that")


def bf16(step, forced, rounds):
    "The step in bfloat16 where the CPU has instructions for it."
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f: flags = f.read().split()
    except OSError: flags = []
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    print("bfloat16 units:", ", ".join(units) or "none (neither AMX nor AVX-512), PyTorch would emulate them")
    if not units and not forced: return
    times = {"fp32": [], "bf16": []}
    for round in range(rounds + 1):
        for name in times:
            spent = timed(lambda: step(bf16=name == "bf16"))
            if round: times[name].append(spent)
    for word, f in {"min": min, "median": statistics.median}.items():
        print(f"{word}: fp32 / bf16 {f(times['fp32']) / f(times['bf16']):.2f}")
