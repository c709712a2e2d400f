"""MEME: the bound against closed forms and quadrature, partial data, many samples, errors, resuming."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from litvae.core.files import LitvaeError
from litvae.core.training import Task, Trainer
from litvae.data.pairs import PairedData, PartialData
from litvae.kernels.counting import saved_bytes
from litvae.meme.bound import supervised_bound
from litvae.meme.modalities import (CaptionDecoder, CaptionEncoder, Modality, digit_decoder, digit_encoder,
                                    street_decoder, street_encoder)
from litvae.meme.model import Meme, class_likelihoods, log_mixture


def line(slope_in, std_in, slope_out, std_out):
    "A modality of one number with linear maps: q(z|x) = N(slope_in x, std_in^2), p(x|z) = N(slope_out z, std_out^2)."
    encoder, decoder = nn.Linear(1, 2).double(), nn.Linear(1, 1, bias=False).double()
    spread = math.log(math.expm1(std_in - 1e-3))                        # the inverse of softplus + floor
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[slope_in], [0.0]], dtype=torch.float64))
        encoder.bias.copy_(torch.tensor([0.0, spread], dtype=torch.float64))
        decoder.weight.fill_(slope_out)
    return Modality(encoder, decoder, "gaussian", scale=std_out)


def integrated_bound(model, s, t, nodes=120):
    "Equation (1) with both integrals by Gauss-Hermite quadrature over q(z|s), (1,)."
    given = {"s": torch.tensor([[s]], dtype=torch.float64), "t": torch.tensor([[t]], dtype=torch.float64)}
    q, prior = (model.encode(name, value) for name, value in given.items())
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    z = q.base_dist.loc + q.base_dist.scale * torch.from_numpy(x)[:, None, None]          # (nodes, 1, 1)
    log_w = torch.from_numpy(w / math.sqrt(2 * math.pi)).log()[:, None]
    log_s, log_t = (model.modalities[name].log_likelihood(value, z) for name, value in given.items())
    target = (log_t + log_w).logsumexp(0)
    inside = log_s + prior.log_prob(z) - q.log_prob(z) - log_t
    return ((log_w + log_t - target).exp() * inside).sum(0) + target, inside


def evidence(model, s, t):
    prior = model.encode("t", torch.tensor([[t]], dtype=torch.float64)).base_dist
    part = model.modalities["s"]
    slope, std = part.decoder.weight, part.options["scale"]
    spread = (slope ** 2 * prior.scale ** 2 + std ** 2).sqrt()
    return Normal(slope * prior.loc, spread).log_prob(torch.tensor(s)).view(1)


@torch.no_grad()
def test_the_bound_is_exact_when_the_recognition_side_mirrors_the_generative_one():
    a, b, std_s, std_prior = 1.3, 0.7, 0.6, 0.9
    model = Meme({"s": line(1 / a, std_s / a, a, std_s), "t": line(b, std_prior, 1 / b, std_prior / b)}, 1)
    bound, inside = integrated_bound(model, 0.8, -0.5)
    torch.testing.assert_close(bound, evidence(model, 0.8, -0.5), rtol=0, atol=1e-8)
    torch.testing.assert_close(inside, inside[:1].expand_as(inside), rtol=0, atol=1e-8)    # the same for every code


@torch.no_grad()
def test_the_bound_never_exceeds_the_evidence():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        slopes, stds = rng.normal(size=4), np.exp(rng.normal(size=4) / 2)
        model = Meme({"s": line(slopes[0], stds[0], slopes[1], stds[1]),
                      "t": line(slopes[2], stds[2], slopes[3], stds[3])}, 1)
        s, t = rng.normal(size=2)
        bound, _ = integrated_bound(model, s, t)
        assert bound <= evidence(model, s, t) + 1e-6


def parts(latent=6, **options):
    torch.manual_seed(0)
    return {"digit": Modality(digit_encoder(latent, 32), digit_decoder(latent, 32), **options),
            "street": Modality(street_encoder(latent, 2), street_decoder(latent, 2), **options)}


def batch(count=5):
    generator = torch.Generator().manual_seed(1)
    return {"digit": torch.rand(count, 1, 28, 28, generator=generator),
            "street": torch.rand(count, 3, 32, 32, generator=generator)}


def test_the_weight_is_at_most_the_number_of_samples():
    for scale in (1.0, 1e3, 1e5):
        log_t = -scale * torch.rand(11, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        zero, one = torch.zeros(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
        bounds = [supervised_bound(log_t[0] + value, zero, log_t, class_weight=0.0) for value in (zero, one)]
        weight = bounds[1] - bounds[0]
        assert weight.min() >= 0 and weight.max() <= 11 + 1e-6


@pytest.mark.parametrize("kl", ["paper", "released"])
def test_one_example_and_tiny_likelihoods_are_finite(kl):
    model = Meme(parts(scale=1e-3), 6, kl=kl, samples=3)                 # log-likelihoods of about -1e6
    loss = model.loss(batch(1)).total
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("samples", [1, 10, 30])
def test_decoding_few_samples_again_changes_no_gradient(samples):
    part, x = parts(scale=0.05 if samples < 30 else 100.0)["street"].double(), {"street": batch()["street"].double()}
    z = torch.randn(samples + 1, 5, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for tolerance in (2 ** -30, 0):
        part.zero_grad()
        value = class_likelihoods({"street": part}, x, z, tolerance).logsumexp(0).sum()
        results.append((value, *torch.autograd.grad(value, [z, *part.decoder.parameters()])))
    for few, all_ in zip(*results): torch.testing.assert_close(few, all_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-2, 1e2])                          # one sample counts, or all do
def test_many_samples_need_little_more_memory_than_one(scale):
    part, x = parts(scale=scale)["street"], {"street": batch(32)["street"]}
    z = torch.randn(31, 32, 6, requires_grad=True)
    one = saved_bytes(lambda: part.log_likelihood(x["street"], z[:1]).sum())
    assert saved_bytes(lambda: class_likelihoods({"street": part}, x, z).sum()) < 1.5 * one


def test_batch_norm_in_a_decoder_sees_all_samples_at_once():
    caption = Modality(CaptionEncoder(4, 50, 32, 4), CaptionDecoder(4, 50, 32, 4), "words")
    seen = []
    caption.decoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    words = torch.randint(3, 50, (5, 32))
    class_likelihoods({"caption": caption}, {"caption": words}, torch.randn(4, 5, 4))
    assert seen == [20]
    caption.eval()
    seen.clear(), class_likelihoods({"caption": caption}, {"caption": words}, torch.randn(4, 5, 4))
    assert len(seen) > 1                                                 # without it some codes are tried first


def test_with_weight_one_the_classifier_learns_nothing_on_average():
    "Decoder and encoder gradients through log q(t|z): zero within error at weight 1, far from it at weight 0."
    model, x = Meme(parts(scale=0.5), 6, samples=1), batch(4)
    decoder, zero = list(model.modalities["street"].decoder.parameters()), torch.zeros(4)
    found = {0.0: [], 1.0: []}
    for weight, repeat in ((weight, repeat) for weight in found for repeat in range(200)):
        torch.manual_seed(repeat)
        z = model.encode("digit", x["digit"]).rsample((2,))
        log_t = class_likelihoods({"street": model.modalities["street"]}, x, z)
        gradient = torch.autograd.grad(supervised_bound(zero, zero, log_t, weight).sum(), decoder)
        found[weight].append(torch.cat([g.flatten() for g in gradient]))
    stacked = {weight: torch.stack(gradients) for weight, gradients in found.items()}
    direction = stacked[0.0].mean(0) / stacked[0.0].mean(0).norm()
    along = {weight: (g @ direction) for weight, g in stacked.items()}
    error = {weight: a.std() / len(a) ** 0.5 for weight, a in along.items()}
    assert abs(along[1.0].mean()) < 4 * error[1.0] and along[0.0].mean() > 10 * error[0.0]


def test_a_step_on_one_modality_leaves_the_absent_decoder_alone_and_moves_the_pseudo_samples():
    pseudo = {name: x[:3] for name, x in batch().items()}
    model = Meme(parts(), 6, pseudo=pseudo)
    model.loss({"street": batch()["street"]}).total.backward()
    assert all(p.grad is None for p in model.modalities["digit"].decoder.parameters())
    torch.optim.Adam([p for p in model.parameters() if p.grad is not None], lr=0.1).step()
    assert not model.pseudo["digit"].equal(pseudo["digit"]) and model.pseudo["street"].equal(pseudo["street"])


def test_densities_by_matrix_product_agree_with_the_direct_form_where_they_cancel_most():
    generator = torch.Generator().manual_seed(0)
    mean = 1 + torch.randn(40, 20, generator=generator) * 1e-2
    std = 1e-3 * (1 + torch.rand(40, 20, generator=generator))
    z = mean[:30] + 1e-3 * torch.randn(30, 20, generator=generator)
    direct = Normal(mean.double(), std.double()).log_prob(z.double()[:, None]).sum(-1).logsumexp(1) - math.log(40)
    torch.testing.assert_close(log_mixture(z.double(), mean.double(), std.double()), direct, rtol=1e-9, atol=1e-9)
    assert (log_mixture(z, mean, std) - direct).abs().max() < 0.05       # float32


@pytest.mark.parametrize("given, message", [
    ({"digit": torch.rand(5, 1, 28, 28), "street": torch.rand(4, 3, 32, 32)}, "unequal length"),
    ({"digit": torch.rand(5, 1, 28, 28), "sound": torch.rand(5, 8)}, "unknown modality 'sound'"),
    ({}, "empty"), ({"digit": torch.rand(5, 1, 28, 28)}, "pseudo-samples of street")])
def test_batches_that_do_not_fit_are_refused(given, message):
    with pytest.raises(LitvaeError, match=message): Meme(parts(), 6).loss(given)


def test_cross_generation_needs_no_partner_and_one_shape():
    model, x = Meme(parts(), 6).eval(), batch()
    for source, target in (("digit", "street"), ("street", "digit"), ("digit", "digit")):
        assert model.cross_generate(source, target, x[source]).shape == x[target].shape
    torch.testing.assert_close(*(model.cross_generate("digit", "street", x["digit"], sample=False) for _ in range(2)))


class Pairs(Task):
    "A MEME on half of the pairs, a step on one modality after each step on pairs."
    def __init__(self):
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        paired = PairedData("noise", "standin", "train", {
            "digit": rng.integers(256, size=(64, 28, 28, 1), dtype=np.uint8),
            "street": rng.integers(256, size=(64, 32, 32, 3), dtype=np.uint8)}, np.arange(64) % 10)
        model = Meme(parts(), 6, pseudo={name: x[:3] for name, x in batch().items()})
        super().__init__(model, nn.Module(), PartialData(paired, 0.5, "split", 0))

    def rows(self, step, batch_size, seed): return self.train_data.rows(step, batch_size, seed, 1)
    def batch(self, indices): return self.train_data.batch(indices)
    def forward(self, batch): return self.model.loss(batch)


def test_a_training_on_partial_data_goes_on_to_the_bit():
    whole, first, second = (Trainer(Pairs(), 1e-3, 8) for _ in range(3))
    parts = whole.advance(9)
    assert {"paired", "partial"} <= set(parts)
    first.advance(4), second.advance(2)
    second.load_state_dict(first.state_dict())
    second.advance(5)
    for name, value in whole.task.state_dict().items(): assert value.equal(second.task.state_dict()[name]), name
