"The component VAE, its layers and GECO against closed forms, finite differences and the published counts."
import math, random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from litvae.core.files import LitvaeError
from litvae.core.layers import BroadcastConv2d, SpatialBroadcastDecoder
from litvae.core.objectives import Elbo, Geco, geco_for_images
from litvae.genesis import ComponentVAE

LATENTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


# Parameters: counted on the published code

PUBLISHED = {"sbd": [357_509, 358_311, 359_915, 363_123, 369_539, 382_371, 408_035, 459_363, 955_491],
             "dc": [1_131_623, 1_229_931, 1_426_547, 1_819_779, 2_606_243, 4_179_171, 7_325_027, 13_616_739,
                    26_200_163]}
PARTS = {"sbd": (336_480, 33_059), "dc": (1_619_776, 986_467)}     # encoder and decoder at latent 16


def count(module): return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameter_counts_are_the_published_ones(kind):
    with torch.device("meta"): vaes = [ComponentVAE(kind=kind, latent=latent, size=64) for latent in LATENTS]
    assert [count(vae) for vae in vaes] == PUBLISHED[kind]
    sixteen = vaes[LATENTS.index(16)]
    assert (count(sixteen.encoder), count(sixteen.decoder)) == PARTS[kind]
    assert all(p.requires_grad for p in sixteen.parameters())


# The analytic first layer of the broadcast decoder

def by_loops(layer, z):
    "The layer's definition, pixel by pixel, in numpy: copy the code, append the coordinates, convolve."
    weight, bias, planes, z = (t.detach().double().numpy() for t in (layer.weight, layer.bias, layer.coordinates[0], z))
    side, kernel = planes.shape[-1], weight.shape[-1]
    line = np.linspace(-1, 1, side)
    assert np.abs(planes - [np.repeat(line[:, None], side, 1), np.repeat(line[None], side, 0)]).max() < 1e-7
    out = np.zeros((len(z), len(weight), side - kernel + 1, side - kernel + 1))
    for b, code in enumerate(z):
        canvas = np.concatenate([np.tile(code[:, None, None], (1, side, side)), planes])
        for row in range(out.shape[2]):
            for column in range(out.shape[3]):
                patch = canvas[:, row:row + kernel, column:column + kernel]
                out[b, :, row, column] = (weight * patch).sum((1, 2, 3)) + bias
    return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("latent, batch, canvas, kernel", [
    (1, 1, 5, 3), (1, 3, 8, 3), (7, 2, 9, 5), (16, 1, 7, 1), (256, 1, 7, 3), (256, 2, 6, 3), (5, 4, 3, 3)])
def test_the_analytic_layer_equals_its_definition(latent, batch, canvas, kernel, dtype, tolerance):
    torch.manual_seed(latent)
    layer = BroadcastConv2d(latent, 6, canvas, kernel).to(dtype)
    z = torch.randn(batch, latent, dtype=dtype)
    assert np.abs(layer(z).detach().numpy() - by_loops(layer, z)).max() <= tolerance
    assert np.abs(layer.naive(z).detach().numpy() - by_loops(layer, z)).max() <= tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("latent, batch, canvas, kernel", [
    (1, 1, 72, 3), (1, 32, 19, 3), (16, 1, 21, 3), (256, 1, 21, 3), (256, 5, 13, 3), (7, 3, 15, 5), (3, 2, 3, 3),
    (4, 2, 9, 1)])
def test_the_analytic_layer_has_the_gradients_of_the_naive_one(latent, batch, canvas, kernel, dtype, tolerance):
    "Value, and the gradient of a random mean over the pixels with respect to code, weight and bias."
    torch.manual_seed(latent)
    layer = BroadcastConv2d(latent, 32, canvas, kernel).to(dtype)
    z = torch.randn(batch, latent, dtype=dtype, requires_grad=True)
    found = []
    for form in (layer, layer.naive):
        y = form(z)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=dtype) / y[0, 0].numel()
        found.append([y, *torch.autograd.grad(y, [z, layer.weight, layer.bias], cotangent)])
    for ours, theirs in zip(*found):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert (ours - theirs).abs().max() <= tolerance


def test_the_analytic_layer_takes_any_layout_and_its_gradients_are_right():
    layer = BroadcastConv2d(3, 2, canvas=5).double()
    strided = torch.randn(6, 4, dtype=torch.float64).T[:, ::2]     # (4, 3), not contiguous
    assert not strided.is_contiguous() and torch.allclose(layer(strided), layer.naive(strided), rtol=0, atol=1e-12)
    assert layer(strided[:0]).shape == layer.naive(strided[:0]).shape == (0, 2, 3, 3)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in (layer.weight, layer.bias)]
    call = lambda z, weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (z,))
    assert torch.autograd.gradcheck(call, (z, *parameters)) and torch.autograd.gradgradcheck(call, (z, *parameters))


def flops(form, latent, batch=8):
    "Floating-point operations of a forward and backward pass: those of convolutions, and all."
    z = torch.randn(batch, latent, requires_grad=True)
    with FlopCounterMode(display=False) as counter: form(z).sum().backward()
    counts = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    return sum(number for op, number in counts.items() if "conv" in op), sum(counts.values())


def naive(decoder):
    "A decoder with its first layer in the naive form."
    first, *others = decoder
    return lambda z: nn.Sequential(*others)(first.naive(z))


def test_the_cost_of_the_broadcast_decoder_does_not_depend_on_the_code():
    first = {latent: flops(BroadcastConv2d(latent, 32, canvas=72), latent) for latent in (16, 256)}
    assert first[16][0] == first[256][0] > 0
    product = 2 * 8 * 256 * 32                                     # z @ W, a multiply and an add each; two gradients
    assert first[256][1] - first[256][0] <= 3 * product
    whole = {latent: flops(SpatialBroadcastDecoder(latent), latent) for latent in (16, 256)}
    assert whole[16][0] == whole[256][0] and abs(whole[256][1] / whole[16][1] - 1) < 1e-3
    assert flops(naive(SpatialBroadcastDecoder(256)), 256)[1] > 2 * whole[256][1]


def test_the_whole_decoder_equals_its_naive_form():
    torch.manual_seed(0)
    decoder = SpatialBroadcastDecoder(16, size=11, channels=8)
    z = torch.randn(3, 16)
    assert decoder(z).shape == (3, 3, 11, 11) and (decoder(z) - naive(decoder)(z)).abs().max() < 1e-5


# GECO

def plain_geco(errors, kls, goal, step_size=1e-5, momentum=0.99, speedup=10.0, beta=1.0, beta_min=1e-10,
               beta_max=1e10):
    "The algorithm in numbers: for each step the loss, then beta, the moving average and the first step at the goal."
    average, reached, rows = None, -1, []
    for step, (err, kl) in enumerate(zip(errors, kls), 1):
        loss = err + beta * kl
        average = err if average is None else momentum * average + (1 - momentum) * err
        slack = goal - average
        if slack > 0: slack_times_speed = speedup * slack
        else: slack_times_speed = slack
        beta = min(max(beta * math.exp(step_size * slack_times_speed), beta_min), beta_max)
        if slack >= 0 and reached < 0: reached = step
        rows.append((loss, beta, average, reached))
    return rows


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name, settings", {
    "published": dict(goal=7000.0),
    "paced": dict(goal=7000.0, step_size=2e-4, momentum=0.9, speedup=3.0, beta=0.5),
    "clamped": dict(goal=7000.0, step_size=3e-3, momentum=0.8, beta_min=1e-2, beta_max=20.0),
}.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_geco_equals_a_plain_loop(name, settings, dtype, tolerance):
    "Errors that wander to both sides of the goal, in training steps between which evaluations must change nothing."
    rng = random.Random(name)
    errors = [7000 + 200 * math.sin(step / 25 + 1) + rng.gauss(0, 60) for step in range(500)]
    kls = [rng.uniform(0, 120) for _ in range(500)]
    rows = plain_geco(errors, kls, **settings)
    if name == "clamped": assert {min(row[1] for row in rows), max(row[1] for row in rows)} == {1e-2, 20.0}
    sides = [row[2] <= settings["goal"] for row in rows]
    assert sum(a != b for a, b in zip(sides, sides[1:])) >= 3 and not sides[0] and rows[-1][3] > 1
    geco = Geco(**settings)
    for err, kl, (loss, beta, average, reached) in zip(errors, kls, rows):
        geco.eval()(torch.tensor(1.0), torch.tensor(1.0)), geco.train()
        kl = torch.tensor(kl, dtype=dtype, requires_grad=True)
        used, ours = geco.beta.item(), geco(torch.tensor(err, dtype=dtype), kl)
        ours.backward()                                            # with beta from before the update
        assert kl.grad.item() == pytest.approx(used, rel=1e-6)
        assert ours.dtype == dtype and ours.item() == pytest.approx(loss, rel=tolerance)
        assert geco.beta.item() == pytest.approx(beta, rel=tolerance)
        assert geco.err_ema.item() == pytest.approx(average, rel=tolerance)
        assert geco.goal_update.item() == reached or dtype == torch.float32
    assert geco.updates.item() == 500 and not list(geco.parameters())


def test_geco_passes_no_gradient_through_its_own_state():
    geco = Geco(goal=5.0, step_size=0.1)
    err, kl = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    for beta in (1.0, geco.beta.item()):
        for value in (err, kl): value.grad = None
        expected = geco.beta.item()
        geco(err, kl).backward()
        assert err.grad.item() == 1 and kl.grad.item() == pytest.approx(expected)
    assert not geco.beta.requires_grad and not geco.err_ema.requires_grad


def test_geco_for_images_has_the_published_constants():
    geco = geco_for_images(64)
    assert geco.goal == pytest.approx(6948.864, abs=1e-9) and geco.step_size == 1e-5
    assert geco_for_images(32).step_size == pytest.approx(4e-5)
    assert geco_for_images(128, factor=2.0).step_size == pytest.approx(0.5e-5)
    assert (geco.momentum, geco.speedup, geco.beta.item()) == (0.99, 10.0, 1.0)
    assert (geco.beta_min, geco.beta_max) == (1e-10, 1e10)
    for bad in (dict(beta=0.0), dict(beta=-1.0), dict(beta_min=2.0), dict(beta_max=0.5), dict(beta_min=0.0)):
        with pytest.raises(LitvaeError, match="beta"): Geco(1.0, **bad)


def test_geco_is_saved_and_restored_to_the_bit():
    first, second = Geco(7.0, step_size=0.01), Geco(7.0, step_size=0.01)
    steps = [(torch.tensor(5 + 4 * math.sin(i)), torch.tensor(1.0)) for i in range(40)]
    for step in steps[:20]: first(*step)
    second.load_state_dict(first.state_dict())
    for step in steps[20:]: assert torch.equal(first(*step), second(*step))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers()))


# The loss of the component VAE

SMALL = {"sbd": dict(kind="sbd", latent=3, size=8, channels=2, layers=2),
         "dc": dict(kind="dc", latent=3, size=8, channels=2, strides=(1, 2, 1, 1, 1))}


def small(kind, dtype=torch.float64, batch=4):
    torch.manual_seed(1)
    return ComponentVAE(**SMALL[kind]).to(dtype), torch.rand(batch, 3, 8, 8, dtype=dtype)


def raw_posterior(vae, x):
    "Mean and standard deviation of the posterior, from the encoder's output by hand."
    output = vae.encoder(torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)).detach().numpy()
    mean, spread = output[:, :vae.latent], output[:, vae.latent:]
    return mean, np.log1p(np.exp(spread + 0.5)) + 1e-8


@pytest.mark.parametrize("kind", SMALL)
def test_the_loss_is_its_formula(kind):
    """err: minus the log density of a Gaussian with standard deviation 0.7 summed over pixels and channels, averaged
    over the batch. kl: the difference of two Gaussian log densities at the sampled code."""
    vae, x = small(kind)
    vae.eval()
    torch.manual_seed(5)
    loss = vae.loss(x)
    torch.manual_seed(5)
    out = vae(x)
    mean, std = raw_posterior(vae, x)
    z, pixels, image = out.z.detach().numpy(), 1 / (1 + np.exp(-vae.decoder(out.z).detach().numpy())), x.numpy()
    err = (0.5 * ((image - pixels) / 0.7) ** 2 + math.log(0.7) + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3)).mean()
    kl = (0.5 * z ** 2 - 0.5 * ((z - mean) / std) ** 2 - np.log(std)).sum(1).mean()
    assert loss.parts["err"].item() == pytest.approx(err, rel=1e-12)
    assert loss.parts["kl"].item() == pytest.approx(kl, rel=1e-9)
    assert loss.total.item() == pytest.approx(err + kl, rel=1e-12)
    torch.manual_seed(5)
    assert vae.loss(x, Elbo(beta=3.0)).total.item() == pytest.approx(err + 3 * kl, rel=1e-12)
    torch.manual_seed(5)
    geco = Geco(goal=1.0, beta=0.25)
    assert vae.loss(x, geco).total.item() == pytest.approx(err + 0.25 * kl, rel=1e-12)
    assert geco.err_ema.item() == pytest.approx(err, rel=1e-12)


@pytest.mark.parametrize("kind", SMALL)
def test_the_sampled_kl_agrees_with_the_analytic_one(kind):
    vae, x = small(kind, batch=1)
    vae.eval()
    mean, std = raw_posterior(vae, x)
    analytic = 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * np.log(std)).sum()
    torch.manual_seed(0)
    samples = 4_000
    repeated = x.expand(samples, -1, -1, -1)
    posterior = vae.posterior(x)
    z = posterior.expand((samples,)).rsample()
    assert z.shape == (samples, 3) and (z.mean(0) - torch.tensor(mean)).abs().max() < 5 * std.max() / samples ** 0.5
    by_samples = np.array([vae.loss(repeated[i:i + 200]).parts["kl"].item() for i in range(0, samples, 200)])
    error = by_samples.std(ddof=1) / len(by_samples) ** 0.5
    assert 0 < error < 0.1 and abs(by_samples.mean() - analytic) < 4 * error


@pytest.mark.parametrize("kind", SMALL)
def test_the_gradients_of_the_loss_are_those_of_finite_differences(kind):
    "One component, float64, noise held fixed: every parameter along random directions, and some of its entries."
    vae, x = small(kind)
    vae.train()
    def value():
        torch.manual_seed(3)
        return vae.loss(x, Elbo(beta=0.7)).total
    vae.zero_grad()
    value().backward()
    generator, width = torch.Generator().manual_seed(0), 1e-5
    for name, p in vae.named_parameters():
        gradient, start = p.grad.clone(), p.detach().clone()
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for _ in range(2)]
        entries = torch.randint(p.numel(), (3,), generator=generator)
        directions += [F.one_hot(i, p.numel()).view(p.shape).to(p.dtype) for i in entries]
        for direction in directions:
            with torch.no_grad():
                ends = []
                for sign in (1, -1):
                    p.copy_(start + sign * width * direction)
                    ends.append(value().item())
                p.copy_(start)
            slope, ours = (ends[0] - ends[1]) / (2 * width), (gradient * direction).sum().item()
            assert ours == pytest.approx(slope, rel=1e-5, abs=2e-5), name
    assert gradient.dtype == torch.float64


@pytest.mark.parametrize("kind", SMALL)
def test_single_precision_is_double_precision_rounded(kind):
    vae, x = small(kind, torch.float32)
    vae.eval()
    single = vae.loss(x, sample=False)
    double = vae.double().loss(x.double(), sample=False)
    assert single.total.dtype == torch.float32 and double.total.dtype == torch.float64
    assert single.total.item() == pytest.approx(double.total.item(), rel=1e-5)
