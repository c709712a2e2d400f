"""What the preset `paper` costs: CPU seconds and FLOPs of a training step, and GPU hours estimated from the FLOPs.

    python benchmarks/cost.py [--batch 4] [--steps 1] [--fraction 0.2] [--tensor-fraction 0.1]

Measured: CPU seconds of one thread, forward, backward and Adam, and FLOPs (a multiply-add is two) of convolutions and
matrix products, both at --batch images and scaled to the batch of the preset. Estimated: GPU hours, the FLOPs of all
steps over a fraction of the card's peak; --fraction in fp32, --tensor-fraction in TF32 and bf16.
"""
import argparse, resource, time

import torch
from torch.utils.flop_counter import FlopCounterMode

from litvae.core.environment import hardware
from litvae.core.objectives import geco_for_images
from litvae.core.training import Task, Trainer
from litvae.data import DataSet
from litvae.genesis import ComponentVAE
from litvae.genesis.model import Genesis
from litvae.reproduce.plan import load_paper, load_preset, sweep_configs

PAPER = "reconstruction_bottlenecks"
PEAKS = {("Titan RTX", "fp32"): 16.3e12, ("A100", "fp32"): 19.5e12, ("A100", "TF32"): 156e12,
         ("A100", "bf16"): 312e12}                               # FLOP/s without sparsity, from the makers' data sheets
PAPER_DAYS = 180                                                 # "ca. 180 GPU days" for 90 models on Titan RTX cards


def groups():
    "Label -> configurations of the preset `paper` that differ in data, seed and size of the code alone."
    found = {}
    paper, preset = load_paper(PAPER), load_preset("paper")
    for config in [c for sweep in paper.sweeps for c in sweep_configs(paper, sweep, preset)]:
        kind = config.model.get("component") or f"{config.model['kind'].upper()}-VAE"
        found.setdefault((kind, config.model.get("slots", 1)), []).append(config)
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def trainer(config, batch):
    "A `Trainer` of this configuration on `batch` images of noise."
    model = (Genesis if "component" in config.model else ComponentVAE)(**config.model)
    pixels = torch.randint(0, 256, (batch, model.size, model.size, 3), dtype=torch.uint8).numpy()
    data = DataSet("noise", "standin", "train", {"image": pixels}, {})
    objective = geco_for_images(model.size, **config.objective)
    return Trainer(Task(model, objective, data), config.learning_rate, batch, config.seed)


def measure(config, batch, steps):
    "(CPU seconds, FLOPs) of one training step at the batch of `config`; the counted step is the warm-up."
    loop, scale = trainer(config, batch), config.batch_size / batch
    with FlopCounterMode(display=False) as counter: loop.advance()
    started = time.process_time()
    loop.advance(steps)
    return scale * (time.process_time() - started) / steps, scale * counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 4, "steps": 1, "fraction": 0.2, "tensor-fraction": 0.1}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    share = {"fp32": args.fraction, "TF32": args.tensor_fraction, "bf16": args.tensor_fraction}
    rates = {(card, form): peak * share[form] for (card, form), peak in PEAKS.items()}
    heads = [f"{card} {form}, {share[form]:.0%}: hours" for card, form in PEAKS]
    print(f"{hardware()}, torch {torch.__version__}, measured at batch {args.batch}\n")
    print("| model | slots | runs | CPU s a step | GFLOP a step |", " | ".join(heads), "|")
    print("|---|" + "---:|" * (4 + len(heads)))
    totals = []
    for (kind, slots), configs in groups().items():
        latents = sorted(c.model.get("component_latent") or c.model["latent"] for c in configs)
        middle = next(c for c in configs if latents[len(latents) // 2] in (c.model.get("component_latent"),
                                                                           c.model.get("latent")))
        seconds, flops = measure(middle, args.batch, args.steps)
        hours = [middle.steps * flops / rate / 3600 for rate in rates.values()]
        totals.append((slots > 1, len(configs), middle.steps * flops, hours))
        row = [kind, slots, len(configs), f"{seconds:.2f}", f"{flops / 1e9:.0f}", *[f"{h:.1f}" for h in hours]]
        print("|", " | ".join(map(str, row)), "|", flush=True)
    everything = [sum(runs * h[i] for _, runs, _, h in totals) for i in range(len(rates))]
    print("| all | |", sum(runs for _, runs, _, _ in totals), "| | |", " | ".join(f"{h:.0f}" for h in everything), "|")
    genesis = sum(runs * flops for many, runs, flops, _ in totals if many)
    reached = genesis / (PAPER_DAYS * 24 * 3600 * PEAKS["Titan RTX", "fp32"])
    print(f"\nThe paper's {PAPER_DAYS} days for its 90 models come to {reached:.0%} of a Titan RTX's fp32 peak.")
    print(f"Peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__": main()
