"""The spatial broadcast decoder, forward and backward: first layer analytic against naive, interleaved on one thread.

    python benchmarks/broadcast_decoder.py [--batch 32] [--size 64] [--rounds 15]
"""
import argparse, statistics, time

import torch
from torch import nn

from litvae.core.environment import hardware
from litvae.core.layers import SpatialBroadcastDecoder


def seconds(decoder, first, z):
    "CPU seconds of one forward and backward pass with `first` as the first layer."
    started = time.process_time()
    nn.Sequential(*list(decoder)[1:])(first(z)).sum().backward()
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 32, "size": 64, "rounds": 15, "channels": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware()}, torch {torch.__version__}, batch {args.batch}, {args.size}x{args.size}, fp32")
    print("latent  analytic ms (min, median)  naive ms (min, median)  ratio of medians")
    for latent in (1, 16, 64, 256):
        decoder = SpatialBroadcastDecoder(latent, args.size, args.channels)
        z = torch.randn(args.batch, latent, requires_grad=True)
        forms, times = {"analytic": decoder[0], "naive": decoder[0].naive}, {"analytic": [], "naive": []}
        for round in range(args.rounds + 2):
            for name, first in forms.items():
                spent = seconds(decoder, first, z)
                if round >= 2: times[name].append(1000 * spent)
        cells = [f"{min(t):10.1f} {statistics.median(t):10.1f}" for t in times.values()]
        ratio = statistics.median(times["naive"]) / statistics.median(times["analytic"])
        print(f"{latent:6d}  {cells[0]:>25s}  {cells[1]:>22s}  {ratio:8.2f}")


if __name__ == "__main__": main()
