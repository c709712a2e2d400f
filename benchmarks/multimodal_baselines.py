"""Training steps of MVAE and MMVAE against the multivae package, interleaved on one thread, in CPU seconds.

    python benchmarks/multimodal_baselines.py [--batch 128] [--samples 10] [--rounds 5] [--warm 15] [--model mmvae]

The paper's networks, latent 20, on the digits at hand and street digits, paired by class (printed). Both sides
start from copies of the same networks, with Gaussian posteriors and Laplace likelihoods, and take a whole step: loss,
backward, Adam. MMVAE is the looser bound with DReG. How many of its samples deserve a gradient depends on the training:
the first step is shown apart, and our models take `warm` steps before the others are timed (the package's cost does not
depend on the weights). Needs multivae and mlxtend.
"""
import argparse, copy, statistics, time

import numpy as np
import torch
from multivae.data.datasets.base import MultimodalBaseDataset
from multivae.models import MMVAE, MVAE, MMVAEConfig, MVAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder

from litvae.core.environment import hardware
from litvae.data.pairs import load_digit_pairs
from litvae.meme import mmvae
from litvae.meme.modalities import Modality, digit_decoder, digit_encoder, street_decoder, street_encoder
from litvae.meme.mmvae import Mmvae
from litvae.meme.mvae import Mvae

LATENT = 20


def parts():
    return {"digit": Modality(digit_encoder(LATENT), digit_decoder(LATENT)),
            "street": Modality(street_encoder(LATENT), street_decoder(LATENT))}


# The package, with the same networks

class Encoder(BaseEncoder):
    def __init__(self, part): super().__init__(); self.part, self.latent_dim = part, LATENT

    def forward(self, x):
        q = self.part.encode(x).base_dist
        return ModelOutput(embedding=q.loc, log_covariance=2 * q.scale.log())


class Decoder(BaseDecoder):
    def __init__(self, part): super().__init__(); self.decoder = part.decoder
    def forward(self, z): return ModelOutput(reconstruction=self.decoder(z))


def package(kind, config, modalities, **settings):
    own = copy.deepcopy(dict(modalities))
    config = config(n_modalities=2, latent_dim=LATENT, decoders_dist=dict.fromkeys(own, "laplace"), **settings)
    return kind(config, {name: Encoder(part) for name, part in own.items()},
                {name: Decoder(part) for name, part in own.items()})


class Step:
    "One training step; the package's loss of MMVAE is a sum over the batch."
    def __init__(self, model, ours, divide=1):
        self.model, self.ours, self.divide = model.train(), ours, divide
        learned = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(learned, 1e-3, **(dict(fused=True) if ours else {}))

    def __call__(self, batch):
        self.adam.zero_grad()
        if self.ours: loss = self.model.loss(batch).total
        else: loss = self.model(MultimodalBaseDataset(batch)).loss / self.divide
        loss.backward()
        self.adam.step()


def candidates(samples, batch):
    torch.manual_seed(0)
    start = parts()
    own, flat = Mvae(copy.deepcopy(start), LATENT), dict(memory_format=torch.channels_last)
    yield "MVAE", {"ours": Step(own, True), "ours, channels last": Step(copy.deepcopy(own).to(**flat), True),
                   "multivae": Step(package(MVAE, MVAEConfig, start, warmup=0), False)}
    own = Mmvae(copy.deepcopy(start), LATENT, samples, gradient="dreg")
    peer = package(MMVAE, MMVAEConfig, start, K=samples, prior_and_posterior_dist="normal", learn_prior=False)
    plain = Mmvae(copy.deepcopy(start), LATENT, samples, gradient="dreg", prune=False)
    yield "MMVAE", {"ours": Step(own, True), "ours, channels last": Step(copy.deepcopy(own).to(**flat), True),
                    "ours, not pruned": Step(plain, True), "multivae": Step(peer, False, batch)}


def timed(step, batch):
    started = time.process_time()
    step(batch)
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 128, "samples": 10, "rounds": 5, "warm": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", choices=["mvae", "mmvae"], help="only this one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digit_pairs("train", level="plain", seed=0)
    print(f"{hardware()}, torch {torch.__version__}, batch {args.batch}, K = {args.samples}, fp32\n{data.describe()}")
    rows, kept, select = np.random.default_rng(0), [], mmvae.select_samples

    def counting(*arguments):
        kept.append(len((found := select(*arguments))[0]))
        return found

    mmvae.select_samples = counting

    def batch(): return data.batch(rows.integers(len(data), size=args.batch))

    for model, steps in candidates(args.samples, args.batch):
        if args.model not in (None, model.lower()): continue
        first, times = batch(), {name: [] for name in steps}
        begin = {name: timed(step, first) for name, step in steps.items()}
        for _ in range(args.warm):
            some = batch()
            for name in ("ours", "ours, channels last"): steps[name](some)
        for _ in range(args.rounds):
            some = batch()
            for name, step in steps.items(): times[name].append(timed(step, some))
        report(model, times, begin)
    if kept:
        print(f"\nsamples with a gradient, of {2 * args.samples * args.batch}: "
              f"{kept[0]} in the first step, {kept[-1]} in the last")


def report(model, times, begin):
    print(f"\n| {model} | CPU s: first step | min | median | multivae / this: min | median |\n|---|" + "---:|" * 5)
    peer = times["multivae"]
    for name, spent in times.items():
        least, middle = min(spent), statistics.median(spent)
        print(f"| {name} | {begin[name]:.2f} | {least:.2f} | {middle:.2f} | {min(peer) / least:.2f} | "
              f"{statistics.median(peer) / middle:.2f} |")


if __name__ == "__main__": main()
