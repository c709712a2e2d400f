"""One training step of MEME on pairs against the straightforward form, interleaved on one thread, in CPU seconds.

    python benchmarks/meme_step.py [--batch 128] [--samples 10] [--latent 20] [--rounds 5] [--trained 300]

The straightforward form is written below: equation (1) in both directions, the K + 1 codes decoded one after the other
in a loop, every one of them with a graph, Adam tensor by tensor. Both have one loss and one gradient, which is checked
first. How many codes need a gradient depends on the model: an untrained decoder gives all codes one picture. So the
step is measured before and after `--trained` short steps on the stand-in digits. What the forward pass keeps for the
backward pass stands beside that of decoding one code of each modality.
"""
import argparse, copy, math, statistics

import torch

from litvae.core.environment import hardware
from litvae.core.training import batch_indices
from litvae.data.pairs import load_digit_pairs
from litvae.kernels.counting import saved_bytes
from litvae.meme.modalities import Modality, digit_decoder, digit_encoder, street_decoder, street_encoder
from litvae.meme.model import Meme

from measuring import peak_growth, same_loss_and_gradients, timed


def build(latent, samples):
    parts = {"digit": Modality(digit_encoder(latent), digit_decoder(latent), weight=3072 / 784),
             "street": Modality(street_encoder(latent), street_decoder(latent))}
    return Meme(parts, latent, samples=samples)


def direction(model, batch, source, target):
    q, prior = model.encode(source, batch[source]), model.encode(target, batch[target])
    codes = q.rsample((1 + model.samples[target],))
    log_t = torch.stack([model.modalities[target].log_likelihood(batch[target], z) for z in codes])
    log_target = log_t.logsumexp(0) - math.log(len(log_t))
    z = codes[0]
    log_s = model.modalities[source].log_likelihood(batch[source], z)
    weight = (log_t[0] - log_target).exp().detach()
    return weight * (log_s + prior.log_prob(z) - q.log_prob(z) - log_t[0]) + log_target


class Step:
    def __init__(self, model, batch, plain):
        self.model, self.batch, self.plain = copy.deepcopy(model), batch, plain
        form = dict(foreach=False) if plain else dict(fused=True)
        self.adam = torch.optim.Adam(self.model.parameters(), 1e-3, **form)

    def loss(self):
        if not self.plain: return self.model.loss(self.batch).total
        pairs = ("digit", "street"), ("street", "digit")
        return -torch.stack([direction(self.model, self.batch, *pair) for pair in pairs]).mean(0).mean()

    def __call__(self):
        loss = self.loss()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


def check(model, batch):
    "Both forms have one loss and one gradient, in float64 and on four examples."
    few = {name: x[:4].double() for name, x in batch.items()}
    return same_loss_and_gradients(lambda plain: Step(model.double(), few, plain), 1e-8)


def decode_once(model, batch):
    "A stand-in for a step: one code of each modality, decoded by both decoders."
    class Once:
        def __init__(self): self.model = model
        def loss(self):
            codes = [model.encode(name, x).rsample() for name, x in batch.items()]
            return sum(part.log_likelihood(batch[name], torch.stack(codes)).sum()
                       for name, part in model.modalities.items())
    return Once()


def measure(model, batch, rounds):
    steps = {"ours": Step(model, batch, plain=False), "straightforward": Step(model, batch, plain=True)}
    for step in steps.values(): step()                                                # warm-up
    memory = {name: (saved_bytes(step.loss, step.model.parameters()), peak_growth(step))
              for name, step in steps.items()}
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items(): times[name].append(timed(step))
    for name in steps:
        saved, growth = ("-" if n is None else f"{n / 2**20:.0f} MiB" for n in memory[name])
        print(f"  {name}: CPU s {min(times[name]):.3f} (min), {statistics.median(times[name]):.3f} (median); "
              f"saved for backward {saved}; growth of memory {growth}")
    once = saved_bytes(decode_once(model, batch).loss, model.parameters())
    print(f"  one decode of each code: saved for backward {once / 2**20:.0f} MiB")
    a, b = times["straightforward"], times["ours"]
    ratios = {"min": min(a) / min(b), "median": statistics.median(a) / statistics.median(b)}
    print("  straightforward / ours: " + ", ".join(f"{ratio:.2f} ({word})" for word, ratio in ratios.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 128, "samples": 10, "latent": 20, "rounds": 5, "trained": 300}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, pairs = build(args.latent, args.samples), load_digit_pairs("train", "standin")
    batch = pairs.batch(range(args.batch))
    setting = f"batch {args.batch}, K = {args.samples}, latent {args.latent}, fp32"
    print(f"{hardware()}, torch {torch.__version__}, {setting}")
    print(f"same loss and gradients: largest difference {check(copy.deepcopy(model), batch):.1e} in float64")
    print("untrained")
    measure(model, batch, args.rounds)
    step = Step(model, batch, plain=False)
    for number in range(args.trained):
        step.batch = pairs.batch(batch_indices(len(pairs), 32, 0, number))
        step()
    print(f"after {args.trained} steps at batch 32")
    measure(step.model, batch, args.rounds)


if __name__ == "__main__": main()
