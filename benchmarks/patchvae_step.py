"""One training step of PatchVAE against the direct form, interleaved on one thread, in CPU seconds.

    python benchmarks/patchvae_step.py [--batch 128] [--size 32] [--width 64] [--rounds 5] [--bf16]

The direct form is written below, as in the released code: the code is built as a product of appearances and
occurrences, the decoder runs twice and its first result is thrown away, tensors lie channel by channel, Adam goes
tensor by tensor. Ours decodes once, its first layer never builds the code, tensors lie pixel by pixel (channels last),
Adam is fused. Both have one loss and one gradient, which is checked first. The sgemm-bound is the time that the step's
FLOPs would take at the rate of a 1024 x 1024 x 1024 product, measured in between.
"""
import argparse

import torch

from litvae.core.environment import hardware
from litvae.patchvae.model import PatchElbo, PatchVae
from litvae.patchvae.parts import patch_code

from measuring import Step, bf16, compare, same_loss_and_gradients


def direct_loss(model, x, objective):
    posterior = model.posterior(x)
    code = patch_code(*model.sample(posterior))
    def decode():
        y = torch.nn.functional.conv_transpose2d(code, model.decoder[0].weight)
        for layer in list(model.decoder)[1:]: y = layer(y)
        return y
    decode()                                                                          # and thrown away
    err = objective.error(model.pixels(x), decode())
    kl_app, kl_occ = posterior.kl(model.prior)
    return objective(err, kl_app, kl_occ)


def step(model, x, plain):
    "The step in its direct form, or in ours."
    form = torch.contiguous_format if plain else torch.channels_last
    model, x = model.to(memory_format=form), x.contiguous(memory_format=form)
    return Step(model, x, PatchElbo(), direct_loss if plain else None, betas=(0.5, 0.999))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 128, "size": 32, "width": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true", help="measure bfloat16 where the CPU only emulates it, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = PatchVae(size=args.size, width=args.width), torch.rand(args.batch, 3, args.size, args.size)
    print(f"{hardware()}, torch {torch.__version__}, batch {args.batch}, {args.size}x{args.size}, width {args.width}, "
          "fp32")
    few = x[:4].double()
    worst = same_loss_and_gradients(lambda plain: step(model.double(), few, plain), 1e-7)
    print(f"same loss and gradients: largest difference {worst:.1e} in float64")
    steps = {"ours": step(model.float(), x, plain=False), "plain": step(model, x, plain=True)}
    compare(steps, args.rounds)
    bf16(steps["ours"], args.bf16, args.rounds)


if __name__ == "__main__": main()
