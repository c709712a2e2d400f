"MVAE, MMVAE, MoPoE, JMVAE, mmJSD: against the multivae package, slow loops, and linear-Gaussian closed forms."
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import nn

from litvae.core.files import LitvaeError
from litvae.meme.mmvae import Mmvae, importance_bound, normalised_weights, select_samples
from litvae.meme.modalities import Modality
from litvae.meme.mopoe import Jmvae, MmJsd, Mopoe, draw_components, geometric_mean, jensen_shannon
from litvae.meme.mvae import Mvae, elbo_subsets

LATENT = 3
SIZES = {"a": 5, "b": 4, "c": 6}
MODELS = {"mvae": Mvae, "mmvae": Mmvae, "mopoe": Mopoe, "jmvae": Jmvae, "mmjsd": MmJsd}


def network(i, o): return nn.Sequential(nn.Linear(i, 7), nn.Tanh(), nn.Linear(7, o))


def parts(names="ab", **settings):
    settings = {"likelihood": "laplace", "scale": 0.6, **settings}
    return {name: Modality(network(size, 2 * LATENT), network(LATENT, size), **settings)
            for name, size in SIZES.items() if name in names}


def build(kind, names="ab", seed=1, family="normal", **settings):
    torch.manual_seed(seed)
    return MODELS[kind](parts(names, family=family), LATENT, **settings).double()


def data(names="ab", count=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, SIZES[name], generator=generator, dtype=torch.float64) for name in names}


def gradients(model): return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(ours, reference, tolerance=1e-6):
    "Equal within `tolerance`, relative to the larger entries of the reference."
    assert (ours - reference).abs().max() <= tolerance * max(1, reference.abs().max())


@pytest.fixture
def noise(monkeypatch):
    "`restart()` makes the standard normal numbers behind `rsample` begin anew, however they are cut into calls."
    stream = torch.randn(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    position = [0]

    def feed(shape, dtype=None, device=None):
        count, start = math.prod(shape), position[0]
        position[0] += count
        return stream[start:start + count].reshape(shape)

    monkeypatch.setattr(D.normal, "_standard_normal", feed)
    return lambda: position.__setitem__(0, 0)


# The multivae package on the same weights and the same noise

def peer(name, model, **settings):
    "The model of that name in multivae with a copy of the networks of `model`."
    pytest.importorskip("multivae")
    import multivae.models as peers
    from multivae.models.nn.base_architectures import BaseJointEncoder
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    def gaussian(q): return ModelOutput(embedding=q.base_dist.loc, log_covariance=2 * q.base_dist.scale.log())

    class Encoder(BaseEncoder):
        def __init__(self, part): super().__init__(); self.part, self.latent_dim = part, LATENT

        def forward(self, x):
            if self.part.family == "normal": return gaussian(self.part.encode(x))
            mean, spread = self.part.encoder(x).chunk(2, dim=-1)
            return ModelOutput(embedding=mean, log_covariance=spread)

    class Decoder(BaseDecoder):
        def __init__(self, part): super().__init__(); self.decoder = part.decoder
        def forward(self, z): return ModelOutput(reconstruction=self.decoder(z.reshape(-1, LATENT)))

    class Joint(BaseJointEncoder):
        def __init__(self, own): super().__init__(); self.own, self.latent_dim = own, LATENT
        def forward(self, x): return gaussian(self.own.joint_posterior(x))

    own = copy.deepcopy(model)
    extra = {"joint_encoder": Joint(own)} if name == "JMVAE" else {}
    config = getattr(peers, name + "Config")(
        n_modalities=len(own.modalities), latent_dim=LATENT, decoders_dist=dict.fromkeys(own.modalities, "laplace"),
        decoder_dist_params={key: {"scale": 0.6} for key in own.modalities}, **settings)
    theirs = getattr(peers, name)(config, {key: Encoder(part) for key, part in own.modalities.items()},
                                  {key: Decoder(part) for key, part in own.modalities.items()}, **extra)
    return theirs.double().train(), own


def dataset(batch):
    from multivae.data.datasets.base import MultimodalBaseDataset
    return MultimodalBaseDataset({name: x.clone() for name, x in batch.items()})


def agree(model, theirs, own, batch, restart, scale=1.0, **call):
    restart()
    loss = model.loss(batch).total
    loss.backward()
    restart()
    reference = theirs(dataset(batch), **call).loss * scale
    reference.backward()
    close(loss.detach(), reference.detach())
    expected = gradients(own)
    assert set(gradients(model)) == set(expected)
    for name, grad in gradients(model).items(): close(grad, expected[name])


@pytest.mark.parametrize("warmup", [0, 4])
def test_mvae_equals_multivae(noise, warmup):
    model = build("mvae", warmup=warmup, beta=1.5)
    theirs, own = peer("MVAE", model, warmup=warmup, beta=1.5)
    if warmup: model.steps += 1          # the peer's epoch 3 of 4 has the weight 2 / 4, our second step of 4 as well
    agree(model, theirs, own, data(), noise, **({"epoch": 3} if warmup else {}))


def test_mvae_equals_multivae_for_three_modalities(noise, monkeypatch):
    model = build("mvae", "abc", subsets=3)
    theirs, own = peer("MVAE", model, warmup=0, k=3)
    monkeypatch.setattr("multivae.models.mvae.mvae_model.choice", lambda subsets, size, replace: np.arange(size))
    agree(model, theirs, own, data("abc"), noise)


@pytest.mark.parametrize("names", ["ab", "abc"])
@pytest.mark.parametrize("family", ["normal", "laplace"])
@pytest.mark.parametrize("gradient", ["plain", "dreg"])
@pytest.mark.parametrize("prune", [True, False])
def test_mmvae_looser_equals_multivae(names, family, gradient, prune):
    model = build("mmvae", names, family=family, prior=family, samples=4, gradient=gradient, learn_prior=True,
                  prune=prune)
    own_prior = torch.linspace(-0.3, 0.4, LATENT, dtype=torch.float64)
    model.prior_spread.data.copy_(own_prior)
    theirs, own = peer("MMVAE", model, K=4, learn_prior=True, loss=f"{gradient.replace('plain', 'iwae')}_looser",
                       prior_and_posterior_dist="normal" if family == "normal" else "laplace_with_softmax")
    theirs.prior_log_var.data.copy_(own_prior)
    batch = data(names)
    torch.manual_seed(5)
    loss = model.loss(batch).total
    loss.backward()
    torch.manual_seed(5)
    reference = theirs(dataset(batch)).loss / 6
    reference.backward()
    if gradient == "plain": close(loss.detach(), reference.detach())
    else: assert (loss - reference).abs() > 1e-3             # theirs is the surrogate: its value is not the bound
    expected = gradients(own) | {"prior_spread": theirs.prior_log_var.grad[0]}
    ours = gradients(model)
    for name in ours: close(ours[name], expected[name])
    assert len(ours) == 8 * len(names) + 1


@pytest.mark.parametrize("family", ["normal", "laplace"])
def test_mmvae_tight_equals_multivae(family):
    model = build("mmvae", family=family, prior=family, samples=4, objective="iwae")
    theirs, own = peer("MMVAE", model, K=4, learn_prior=False, loss="iwae_looser",
                       prior_and_posterior_dist="normal" if family == "normal" else "laplace_with_softmax")
    batch, inputs = data(), dataset(data())
    torch.manual_seed(5)
    loss = model.loss(batch).total
    loss.backward()
    torch.manual_seed(5)
    output = theirs(inputs, detailed_output=True)
    reference = theirs.iwae(output.qz_xs, output.zss, output.recon, inputs).loss / 6
    reference.backward()
    close(loss.detach(), reference.detach())
    for name, grad in gradients(model).items(): close(grad, gradients(own)[name])


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_mopoe_equals_multivae_up_to_its_addition_to_the_variance(noise, names, monkeypatch):
    model = build("mopoe", names, beta=2.5)
    theirs, own = peer("MoPoE", model, beta=2.5)
    agree(model, theirs, own, data(names, count=16), noise)
    import multivae.models.mopoe.mopoe_model as released
    plain = released.poe                             # without the 1e-8 that it adds, nothing but rounding is left
    monkeypatch.setattr(released, "poe", lambda mus, logvars: plain(mus, logvars, eps=0.0))
    noise()
    loss = model.loss(data(names, count=16)).total
    noise()
    close(loss.detach(), theirs(dataset(data(names, count=16))).loss.detach(), tolerance=1e-7)


def test_jmvae_equals_multivae(noise):
    model = build("jmvae", "abc", alpha=0.3)
    theirs, own = peer("JMVAE", model, alpha=0.3, warmup=0)
    agree(model, theirs, own, data("abc"), noise)


# mmJSD against a slow loop

def test_mmjsd_equals_a_slow_loop(noise):
    model, batch = build("mmjsd", "abc", beta=1.3, prior_weight=0.4), data("abc", count=7)
    noise()
    total = model.loss(batch).total.item()
    noise()
    eps, expected = D.normal._standard_normal((7, LATENT)).numpy(), 0.0
    encoded = [model.encode(name, batch[name]).base_dist for name in "abc"]
    for b in range(7):
        experts = [(q.loc[b].detach().numpy(), q.scale[b].detach().numpy()) for q in encoded]
        chosen = experts[min(b // 2, 2)]
        z = torch.tensor(chosen[0] + chosen[1] * eps[b])[None]
        fit = sum(D.Laplace(model.decode(name, z)[0], 0.6).log_prob(batch[name][b]).sum().item() for name in "abc")
        divergence, weights = 0.0, [0.4, 0.2, 0.2, 0.2]
        everyone = [(np.zeros(LATENT), np.ones(LATENT)), *experts]
        for d in range(LATENT):
            precision = sum(w / s[d] ** 2 for w, (_, s) in zip(weights, everyone))
            mean = sum(w * m[d] / s[d] ** 2 for w, (m, s) in zip(weights, everyone)) / precision
            for w, (m, s) in zip(weights, everyone):
                ratio = precision * s[d] ** 2
                divergence += w * 0.5 * (ratio + precision * (m[d] - mean) ** 2 - 1 - math.log(ratio))
        expected += (-fit + 1.3 * divergence) / 7
    assert abs(total - expected) < 1e-6


def test_geometric_mean_is_the_normalised_product_of_powers():
    mean, std = geometric_mean(torch.tensor([[0.], [2.]]), torch.tensor([[1.], [1.]]), torch.tensor([0.25, 0.75]))
    assert mean.item() == pytest.approx(1.5) and std.item() == pytest.approx(1.0)
    q = D.Independent(D.Normal(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)), 1)
    assert jensen_shannon(q).abs().max() < 1e-6                       # everybody agrees with the prior


# Linear-Gaussian cases: the evidence is known

class Affine(nn.Module):
    "x (B, D) -> raw mean and spread, (B, 2 L): a linear mean and a fixed standard deviation."
    def __init__(self, size, generator):
        super().__init__()
        self.weight = torch.randn(size, LATENT, generator=generator, dtype=torch.float64) * 0.4
        self.std = torch.rand(LATENT, generator=generator, dtype=torch.float64) * 1.2 + 0.1

    def forward(self, x): return torch.cat([x @ self.weight, (self.std - 1e-3).expm1().log().expand(len(x), -1)], dim=1)


def linear(kind, seed, **settings):
    "A model with linear decoders, a batch of one, and its log-likelihood."
    generator = torch.Generator().manual_seed(seed)
    built, x, maps = {}, {}, []
    for name in "ab":
        decoder = nn.Linear(LATENT, SIZES[name], bias=False).double()
        decoder.weight.data = torch.randn(SIZES[name], LATENT, generator=generator, dtype=torch.float64)
        built[name] = Modality(Affine(SIZES[name], generator), decoder, "gaussian", scale=0.7)
        x[name] = torch.randn(1, SIZES[name], generator=generator, dtype=torch.float64) * 1.5
        maps.append(decoder.weight.data)
    W = torch.cat(maps)
    covariance = W @ W.T + 0.49 * torch.eye(len(W), dtype=torch.float64)
    evidence = D.MultivariateNormal(torch.zeros(len(W), dtype=torch.float64), covariance)
    log_likelihood = evidence.log_prob(torch.cat([*x.values()], dim=1)).item()
    return MODELS[kind](built, LATENT, **settings).double(), x, log_likelihood


@pytest.mark.parametrize("kind, settings", [("mvae", {}), ("mopoe", {}), ("mopoe", {"prior_in": "all"}),
                                            ("mopoe", {"prior_in": "none"}), ("jmvae", {}), ("mmjsd", {})])
def test_the_expected_elbo_is_never_above_the_evidence(kind, settings, monkeypatch):
    # All integrands are quadratic in z: 2 L points sqrt(L) (+-e_i) give their expectation exactly, without chance.
    axes = math.sqrt(LATENT) * torch.eye(LATENT, dtype=torch.float64)
    points = torch.cat([axes, -axes])
    monkeypatch.setattr(D.normal, "_standard_normal", lambda shape, dtype=None, device=None: points.expand(shape))
    gaps = []
    for seed in range(100):
        model, x, evidence = linear(kind, seed, **settings)
        with torch.no_grad(): elbo = model.elbo({name: value.expand(2 * LATENT, -1) for name, value in x.items()})
        gaps.append(evidence - elbo.mean().item())
    assert min(gaps) > -1e-9 and np.isfinite(gaps).all()


@pytest.mark.parametrize("objective", ["elbo", "looser", "iwae"])
def test_mmvae_bounds_are_below_the_evidence_and_grow_with_the_samples(objective):
    for seed in range(20):
        means = []
        for samples in (1, 8):
            model, x, evidence = linear("mmvae", seed, objective=objective, samples=samples)
            torch.manual_seed(seed)
            with torch.no_grad(): bound = model.elbo({name: value.expand(600, -1) for name, value in x.items()})
            error = bound.std().item() / math.sqrt(600)
            assert bound.mean().item() < evidence + 5 * error + 1e-9
            means.append((bound.mean().item(), error))
        if objective != "elbo": assert means[1][0] > means[0][0] - 4 * (means[0][1] + means[1][1])


@pytest.mark.parametrize("kind", ["mvae", "mopoe"])
def test_a_single_modality_has_the_evidence_of_that_modality(kind, monkeypatch):
    axes = math.sqrt(LATENT) * torch.eye(LATENT, dtype=torch.float64)
    points = torch.cat([axes, -axes])
    monkeypatch.setattr(D.normal, "_standard_normal", lambda shape, dtype=None, device=None: points.expand(shape))
    for seed in range(50):
        model, x, _ = linear(kind, seed)
        W = model.modalities["a"].decoder.weight.data
        covariance = W @ W.T + 0.49 * torch.eye(len(W), dtype=torch.float64)
        evidence = D.MultivariateNormal(torch.zeros(len(W), dtype=torch.float64), covariance).log_prob(x["a"]).item()
        assert model.elbo({"a": x["a"].expand(2 * LATENT, -1)}).mean().item() < evidence + 1e-9


# Pruning, weights and bounds

@pytest.mark.parametrize("settings", [{}, {"gradient": "dreg"}, {"objective": "iwae"},
                                      {"objective": "iwae", "gradient": "dreg"}])
@pytest.mark.parametrize("sharpness", [1.0, 40.0])
def test_pruning_changes_neither_value_nor_gradient(settings, sharpness):
    found = []
    for prune in (True, False):
        model = build("mmvae", samples=12, prune=prune, **settings)
        for part in model.modalities.values(): part.weight = sharpness
        torch.manual_seed(6)
        loss = model.loss(data()).total
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    close(found[0][0], found[1][0], 1e-12)
    for name in found[0][1]: close(found[0][1][name], found[1][1][name])


def counted(model):
    "The number of codes in each call of the decoder of a, by a hook."
    calls = []
    model.modalities["a"].decoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    return calls


def test_pruning_decodes_most_codes_once_and_few_at_a_time():
    model, batch = build("mmvae", samples=12), data(count=5)
    for part in model.modalities.values(): part.weight = 400.0
    calls = counted(model)
    model.loss(batch).total.backward()
    assert calls[:12] == [10] * 12 and sum(calls[12:]) < 50 and max(calls) <= 20
    flat = build("mmvae", samples=12)
    calls = counted(flat)
    flat.loss({name: x * 0 for name, x in batch.items()}).total.backward()           # all samples matter
    assert max(calls) <= 20 and sum(calls) >= 2 * 120                                  # yet no call has more than 2 M B


def test_a_decoder_that_mixes_the_batch_is_not_pruned():
    model, batch = build("mmvae", samples=3), data()
    calls = counted(model)
    model.loss(batch)
    assert len(calls) > 1
    model.modalities["b"].decoder.append(nn.BatchNorm1d(SIZES["b"]).double())
    calls.clear(), model.loss(batch)
    assert calls == [2 * 3 * 6]
    calls.clear(), model.eval().loss(batch)
    assert len(calls) > 1                                             # in evaluation it treats each by itself
    with torch.no_grad(): model.elbo(batch)


def test_selection_follows_the_normalised_weights():
    log_w = torch.randn(2, 9, 4, dtype=torch.float64) * 20
    for objective, axes in (("looser", (1,)), ("iwae", (0, 1))):
        share = log_w.exp() / log_w.exp().sum(axes, keepdim=True)
        close(normalised_weights(log_w, objective), share, 1e-12)
        kept = torch.zeros_like(share, dtype=torch.bool)
        kept[select_samples(log_w, objective)] = True
        assert kept.equal(share > 2 ** -30)


def test_one_sample_makes_the_looser_bound_an_elbo():
    torch.manual_seed(4)
    looser = build("mmvae", samples=1, objective="looser")
    elbo = build("mmvae", samples=1, objective="elbo")
    torch.manual_seed(4)
    one = looser.elbo(data())
    torch.manual_seed(4)
    assert one.equal(elbo.elbo(data()))


def test_no_overflow_at_a_log_likelihood_of_minus_1e5():
    for settings in ({}, {"gradient": "dreg"}, {"objective": "iwae"}, {"prune": False}):
        torch.manual_seed(1)
        model = Mmvae(parts(scale=1e-4), LATENT, samples=5, **settings)                            # float32
        batch = {name: x.float() for name, x in data().items()}
        loss = model.loss(batch).total
        loss.backward()
        assert loss > 1e4 and loss.isfinite() and all(grad.isfinite().all() for grad in gradients(model).values())
    log_w = torch.tensor([-1e5, -1e5 - 1, -3e5])[None, :, None].requires_grad_()
    importance_bound(log_w).sum().backward()
    expected = torch.tensor([0., -1., -math.inf]).softmax(0)
    torch.testing.assert_close(log_w.grad[0, :, 0], expected)                       # full precision in float32
    for kind in ("mvae", "mopoe", "jmvae", "mmjsd"):
        model = MODELS[kind](parts(scale=1e-4), LATENT)
        loss = model.loss(batch).total
        loss.backward()
        assert loss > 1e4 and all(grad.isfinite().all() for grad in gradients(model).values())


# Behaviour

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_every_model_takes_a_batch_of_one_and_any_number_of_modalities(kind, names):
    model, batch = build(kind, names), data(names, count=1)
    loss = model.loss(batch)
    loss.total.backward()
    assert model.elbo(batch).shape == (1,) and loss.total.ndim == 0 and loss.parts
    assert model.joint_posterior(batch).sample().shape == (1, LATENT)
    assert model.cross_generate("a", "b", batch["a"]).shape == (1, SIZES["b"])
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("kind, says", [("mmvae", "component"), ("jmvae", "joint network"), ("mmjsd", "compares")])
def test_models_of_pairs_refuse_partial_batches_and_say_why(kind, says):
    model = build(kind)
    for call in (model.elbo, model.loss):
        with pytest.raises(LitvaeError, match=f"has no b: .*{says}"): call({"a": data()["a"]})


@pytest.mark.parametrize("kind", MODELS)
def test_wrong_batches_are_refused(kind):
    model, batch = build(kind), data()
    shorter = {**batch, "b": batch["b"][:3]}
    for bad, says in (({}, "empty"), ({**batch, "smell": batch["a"]}, "smell"), (shorter, "unequal")):
        with pytest.raises(LitvaeError, match=says): model.loss(bad)


@pytest.mark.parametrize("kind", ["mvae", "mopoe"])
def test_an_absent_modality_gets_no_gradient(kind):
    model = build(kind, "abc")
    model.loss(data("ac")).total.backward()
    assert not any(name.startswith("modalities.b") for name in gradients(model))
    assert {name.split(".")[1] for name in gradients(model)} == {"a", "c"}


def test_mvae_counts_steps_and_warms_up():
    model = build("mvae", warmup=4, beta=2.0)
    plain = build("mvae")
    for step in range(6):
        torch.manual_seed(step)
        found = model.loss(data()).total
        torch.manual_seed(step)
        subsets, batch = elbo_subsets("ab"), data()
        kl = sum(D.kl_divergence(plain.joint_posterior({name: batch[name] for name in subset}),
                                 D.Independent(D.Normal(torch.zeros(6, LATENT), 1.0), 1)).mean() for subset in subsets)
        close(found - plain.loss(batch).total, (2 * min(1, (step + 1) / 4) - 1) * kl, 1e-7)
    model.eval().loss(data())
    assert model.steps == 6 and "steps" in model.state_dict()


def test_mvae_parts_add_up_and_random_subsets_are_drawn():
    model = build("mvae", "abc", subsets=1)
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        seen.add(elbo_subsets("abc", 1)[-1])
        loss = model.loss(data("abc"))
        assert list(loss.parts) == ["joint", "a", "b", "c", "random"]
        close(sum(loss.parts.values()), loss.total.detach(), 1e-12)
    assert seen == {("a", "b"), ("a", "c"), ("b", "c")}


def test_stratified_components_match_the_released_rule():
    for components in (1, 3, 7):
        for batch in (1, 2, 3, 7, 8, 16, 50):
            share, expected = batch // components, []
            for k in range(components): expected += [k] * (share if k < components - 1 else batch - len(expected))
            assert draw_components(components, batch).tolist() == expected


@pytest.mark.parametrize("kind, settings, says", [
    ("mmvae", {"objective": "tight"}, "objective"), ("mmvae", {"samples": 0}, "samples"),
    ("mmvae", {"gradient": "sure"}, "gradient"), ("mmvae", {"prior": "laplace"}, "family"),
    ("mmvae", {"objective": "elbo", "gradient": "dreg"}, "weights"), ("mopoe", {"prior_in": "some"}, "prior_in"),
    ("mopoe", {"components": "x"}, "mode"), ("mmjsd", {"prior_weight": 1.5}, "prior_weight"),
    *((kind, {"family": "laplace"}, "Gaussian") for kind in MODELS if kind != "mmvae")])
def test_bad_arguments_are_refused(kind, settings, says):
    with pytest.raises(LitvaeError, match=says): build(kind, **settings)


def test_dreg_gives_decoders_the_plain_gradient_and_encoders_squared_weights():
    found = {}
    for gradient in ("plain", "dreg"):
        model = build("mmvae", samples=4, gradient=gradient)
        torch.manual_seed(6)
        model.loss(data()).total.backward()
        found[gradient] = gradients(model)
    for name, grad in found["plain"].items():
        same = torch.allclose(grad, found["dreg"][name], atol=1e-12)
        assert same == ("decoder" in name)
