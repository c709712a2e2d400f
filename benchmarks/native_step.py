"""The training step of GENESIS with the C++ operators against the same step without, on one thread, in CPU seconds.

    python benchmarks/native_step.py [--rounds 9] [--bf16]

The sizes are those of the preset `quick`. Both steps are taken in turn in one process, on copies of one model, and are
checked to have the same loss and nearly the same gradients first. The library is compiled here, if there is a compiler.
"""
import argparse, copy, statistics
from pathlib import Path

import torch
import yaml

from litvae.core.environment import hardware
from litvae.core.objectives import geco_for_images
from litvae.genesis.model import Genesis
from litvae.kernels.emulation import cpp_compiler
from litvae.kernels.native import fresh_native, use_native

from measuring import timed

PRESET = Path(__file__).parents[1] / "reproduce/presets/quick.yaml"


def quick_model(kind):
    "GENESIS as the preset trains it on Multi-dSprites, and the size of its batches."
    preset = yaml.safe_load(PRESET.read_text(encoding="utf-8"))["papers"]["reconstruction_bottlenecks"]["genesis"]
    data, nets = preset["sets"]["multi_dsprites"], preset[kind]
    model = Genesis(kind, data["slots"], data[kind][0], preset["mask_latent"], preset["size"], std=preset["std"],
                    mask=preset["mask"], **nets)
    return model, preset["batch_size"]


class Step:
    def __init__(self, model, x, library):
        self.model, self.x, self.library, self.geco = copy.deepcopy(model), x, library, geco_for_images(model.size)
        self.adam = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)

    def gradients(self, bf16=False):
        with use_native(self.library), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self.model.loss(self.x, self.geco).total
        self.adam.zero_grad()
        with use_native(self.library): loss.backward()
        return loss.item()

    def __call__(self, bf16=False):
        self.gradients(bf16)
        self.adam.step()


def check(steps, bf16):
    "The largest relative differences of the loss and of the gradients, both steps with the same noise."
    found = []
    for step in steps.values():
        step = Step(step.model, step.x, step.library)
        torch.manual_seed(0)
        found.append((step.gradients(bf16), torch.cat([p.grad.flatten() for p in step.model.parameters()])))
    (loss, grads), (other, others) = found
    worst = abs(loss - other) / abs(other), ((grads - others).norm() / others.norm()).item()
    assert worst[0] < (1e-2 if bf16 else 1e-5) and (bf16 or worst[1] < 1e-3), f"the two steps differ by {worst}"
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bf16", action="store_true", help="measure bfloat16 autocast as well")
    args = parser.parse_args()
    if not cpp_compiler(): raise SystemExit("there is no C++ compiler here, so there is nothing to compare")
    torch.set_num_threads(1)
    library = fresh_native()
    print(f"{hardware()}, torch {torch.__version__}, preset quick, CPU s of a step on one thread")
    for bf16 in (False, True)[:1 + args.bf16]:
        for kind in ("asymmetric", "symmetric"): measure(kind, bf16, library, args.rounds)


def measure(kind, bf16, library, rounds):
    torch.manual_seed(0)
    model, batch = quick_model(kind)
    x = torch.rand(batch, 3, model.size, model.size)
    steps = {"native": Step(model, x, library), "reference": Step(model, x, None)}
    loss, grads = check(steps, bf16)
    times = {name: [] for name in steps}
    for round in range(rounds + 2):                                                   # two rounds of warm-up
        for name, step in steps.items():
            spent = timed(lambda: step(bf16))
            if round > 1: times[name].append(spent)
    for word, f in {"min": min, "median": statistics.median}.items():
        ours, reference = f(times["native"]), f(times["reference"])
        print(f"{'bf16' if bf16 else 'fp32'} {kind}, {word}: reference {reference:.4f}, native {ours:.4f}, "
              f"ratio {reference / ours:.2f} (loss differs by {loss:.0e}, gradients by {grads:.0e})")


if __name__ == "__main__": main()
