"""One training step of GENESIS against a plain eager form of it, interleaved on one thread, in CPU seconds.

    python benchmarks/genesis_step.py [--batch 8] [--size 64] [--slots 5] [--rounds 5] [--bf16]

The plain form is written below: a Python loop over the slots, the first layer of the broadcast decoder by its
definition, every convolution as such, an LSTM cell fed with image and code, Adam tensor by tensor. Both are checked to
have one loss and one gradient first. The sgemm-bound is the time that the step's FLOPs (convolutions and matrix
products, a multiply-add is two) would take at the rate of a 1024 x 1024 x 1024 product, measured in between.
"""
import argparse, copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

from litvae.core.environment import hardware
from litvae.core.layers import BroadcastConv2d, GatedConv2d
from litvae.core.objectives import geco_for_images
from litvae.genesis.model import Genesis

from measuring import Step, bf16, compare, same_loss_and_gradients


# The plain form

def network(layers, x):
    "The layers one after the other, each by its definition."
    for layer in layers:
        if isinstance(layer, BroadcastConv2d): x = layer.naive(x)
        elif not isinstance(layer, GatedConv2d): x = layer(x)
        elif isinstance(layer.conv, nn.ConvTranspose2d):
            conv = layer.conv
            x = F.conv_transpose2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.output_padding)
            x = F.glu(layer.norm(x), dim=1)
        else:
            x = F.conv2d(x, layer.conv.weight, layer.conv.bias, layer.conv.stride, layer.conv.padding)
            x = F.glu(layer.norm(x), dim=1)
    return x


def posterior(raw):
    mean, spread = raw.chunk(2, dim=1)
    return Normal(mean, F.softplus(spread + 0.5) + 1e-8)


def prior(raw):
    mean, spread = raw.chunk(2, dim=1)
    return Normal(mean.tanh(), torch.sigmoid(spread + 4) + 1e-4)


def recur(lstm, suffix, x, state):
    "One step of an LSTM from the weights of a module."
    if state is None: state = [x.new_zeros(len(x), lstm.hidden_size)] * 2
    weights = [getattr(lstm, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return torch.lstm_cell(x, state, *weights)


def plain_loss(model, x, geco):
    masks, slots, latent = model.masks, model.slots, model.component.latent
    features = network(masks.encoder, x)
    raw = torch.cat([masks.posterior.first_mean(features), masks.posterior.first_spread(features)], dim=1)
    state = memory = None
    codes, kl = [], 0
    for k in range(slots):
        p = Normal(torch.zeros_like(x[:, 0, 0, :1]), 1)
        if k:
            state = recur(masks.posterior.cell, "", torch.cat([features, codes[-1]], dim=1), state)
            memory = recur(masks.prior.rnn, "_l0", codes[-1], memory)
            raw, p = masks.posterior.head(state[0]), prior(masks.prior.head(memory[0]))
        q = posterior(raw)
        codes.append(q.rsample())
        kl = kl + (q.log_prob(codes[-1]) - p.log_prob(codes[-1])).sum(1)
    logits = network(masks.decoder, torch.stack(codes, dim=1).flatten(0, 1)).unflatten(0, (len(x), slots))
    noise = torch.randn(len(x), slots, latent, dtype=x.dtype)
    scope, densities = torch.zeros_like(logits[:, 0]), []
    for k in range(slots):
        log_mask = scope + F.logsigmoid(logits[:, k]) if k < slots - 1 else scope
        scope = scope + F.logsigmoid(-logits[:, k])
        q = posterior(network(model.component.encoder, torch.cat([log_mask, x], dim=1)))
        z = q.loc + noise[:, k] * q.scale
        kl = kl + (q.log_prob(z) - prior(nn.Sequential.forward(model.prior, codes[k])).log_prob(z)).sum(1)
        mean = torch.sigmoid(network(model.component.decoder, z))
        densities.append(log_mask + Normal(mean, model.std).log_prob(x))
    err = -torch.stack(densities).logsumexp(0).flatten(1).sum(1)
    return geco(err.mean(), kl.mean())


# Two steps to compare, and what is counted of them

def step(model, x, plain):
    "The step in its plain form, or in ours."
    return Step(model, x, geco_for_images(model.size), plain_loss if plain else None)


def check(model, x):
    "Both forms have one loss and one gradient, in float64 and on one image."
    return same_loss_and_gradients(lambda plain: step(model.double(), x[:1].double(), plain), 1e-10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 8, "size": 64, "slots": 5, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true", help="measure bfloat16 where the CPU only emulates it, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = Genesis("asymmetric", args.slots, size=args.size), torch.rand(args.batch, 3, args.size, args.size)
    print(f"{hardware()}, torch {torch.__version__}, asymmetric, batch {args.batch}, {args.size}x{args.size}, "
          f"{args.slots} slots, fp32")
    print(f"same loss and gradients: largest difference {check(copy.deepcopy(model), x):.1e} in float64")
    steps = {"ours": step(model, x, plain=False), "plain": step(model, x, plain=True)}
    compare(steps, args.rounds)
    bf16(steps["ours"], args.bf16, args.rounds)


if __name__ == "__main__": main()
