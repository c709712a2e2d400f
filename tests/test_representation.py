"Metrics of shared representations: scikit-learn, closed forms and loops as judges; a stored judge, whole or not."
import json, math, sys

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import squareform
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score
from torch.distributions import Independent, Normal, kl_divergence

from litvae.core import classifiers
from litvae.core.classifiers import (DigitClassifier, GaussianProcessHead, classifier_accuracy, classify, coherence,
                                     fit_gaussian_process, predictive_information, stored_classifier,
                                     train_classifier)
from litvae.core.files import CorruptFileError, LitvaeError
from litvae.core.representation import (Cca, SentenceEmbedder, class_distances, class_linkage, dendrogram_order,
                                        draw_class_matrix, draw_dendrogram, draw_relatedness, effective_sample_size,
                                        gaussian_kl, gradient_snr, importance_log_likelihood, latent_accuracy,
                                        relatedness, sentence_embeddings, tsne)


def codes(count, size, classes, seed, dtype=torch.float32):
    "Random posteriors with labels of which each class occurs."
    generator = torch.Generator().manual_seed(seed)
    mean = 3 * torch.randn(count, size, generator=generator, dtype=dtype)
    std = 0.1 + torch.rand(count, size, generator=generator, dtype=dtype)
    return mean, std, torch.arange(count) % classes


# ------------------------------------------------------------------------------------------------------ relatedness
@pytest.mark.parametrize("seed, ties", [(0, False), (1, False), (2, True), (3, True)])
def test_auc_equals_scikit_learn_with_and_without_ties(seed, ties):
    a, b = codes(40, 3, 4, seed, torch.float64), codes(55, 3, 5, seed + 9, torch.float64)
    if ties: a, b = [(mean[:, :1].round(), 0 * std[:, :1] + 1, labels) for mean, std, labels in (a, b)]
    result = relatedness(*a, *b)
    distance = torch.cat([result["same"], result["different"]])
    truth = np.r_[np.ones(len(result["same"])), np.zeros(len(result["different"]))]
    assert len(distance) == 40 * 55 and (not ties or len(distance.unique()) < 60)
    assert result["auc"] == pytest.approx(roc_auc_score(truth, -distance.numpy()), abs=1e-12)
    assert result["ratio"] == pytest.approx((result["different"].mean() / result["same"].mean()).item(), rel=1e-12)


def test_distances_are_those_of_the_matrix_formula():
    "W2 by matrix square roots, which know nothing of diagonals; the same pairs are those with equal labels."
    a, b = codes(6, 3, 2, 0, torch.float64), codes(4, 3, 2, 1, torch.float64)
    def w2(i, j):
        first, second = np.diag(a[1][i].numpy() ** 2), np.diag(b[1][j].numpy() ** 2)
        root = sqrtm(first)
        cross = np.real(sqrtm(root @ second @ root))
        return math.sqrt(((a[0][i] - b[0][j]) ** 2).sum().item() + np.trace(first + second - 2 * cross))
    same = [w2(i, j) for i in range(6) for j in range(4) if a[2][i] == b[2][j]]
    assert np.allclose(np.sort(relatedness(*a, *b)["same"]), np.sort(same), rtol=1e-10)


@pytest.mark.parametrize("change, words", [
    (lambda m, s, y: (m, s[:, :2], y), "differ in shape"), (lambda m, s, y: (m[0], s[0], y), r"\(N, D\)"),
    (lambda m, s, y: (m, -s, y), "positive"), (lambda m, s, y: (m / 0, s, y), "infinities"),
    (lambda m, s, y: (m, s, y.float()), "integers"), (lambda m, s, y: (m, s, y - 1), "negative"),
    (lambda m, s, y: (m, s, y[:-1]), "integers"), (lambda m, s, y: (m[:0], s[:0], y[:0]), r"\(N, D\)"),
    (lambda m, s, y: (m.long(), s.long(), y), "floats"), (lambda m, s, y: (m[:, :2], s[:, :2], y), r"\(A, D\)")])
def test_bad_codes_are_refused_on_both_sides(change, words):
    good = codes(12, 3, 3, 0)
    for arguments in ((*change(*good), *good), (*good, *change(*good))):
        for metric in (relatedness, class_distances):
            with pytest.raises(LitvaeError, match=words): metric(*arguments)


def test_relatedness_needs_both_kinds_of_pairs():
    mean, std, labels = codes(6, 2, 3, 0)
    with pytest.raises(LitvaeError, match="36 and 0"): relatedness(mean, std, 0 * labels, mean, std, 0 * labels)
    with pytest.raises(LitvaeError, match="0 and 36"): relatedness(mean, std, 0 * labels, mean, std, 0 * labels + 1)


# --------------------------------------------------------------------------------------------------- class matrices
def test_kl_equals_torch_and_a_numerical_integral():
    a, b = codes(7, 4, 2, 0), codes(5, 4, 2, 1)
    normal = lambda mean, std: Independent(Normal(mean.double(), std.double()), 1)
    judge = kl_divergence(normal(a[0][:, None], a[1][:, None]), normal(*b[:2]))
    assert torch.allclose(gaussian_kl(*a[:2], *b[:2]), judge, rtol=1e-10)
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    p, q = Normal(torch.tensor(0.3).double(), 1.2), Normal(torch.tensor(-1.0).double(), 2.0)
    integral = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
    one = [torch.tensor([[v]]).double() for v in (0.3, 1.2, -1.0, 2.0)]
    assert gaussian_kl(*one).item() == pytest.approx(integral.item(), abs=1e-6)
    assert gaussian_kl(*a[:2], *a[:2]).diagonal().abs().max() < 1e-9


@pytest.mark.parametrize("distance", ["wasserstein", "kl"])
def test_class_distances_equal_loops(distance):
    a, b = codes(15, 3, 3, 0), codes(19, 3, 3, 1)
    matrix = class_distances(*a, *b, distance=distance)
    for i in range(3):
        for j in range(3):
            values = []
            for m, s in zip(a[0][a[2] == i].double(), a[1][a[2] == i].double()):
                for n, t in zip(b[0][b[2] == j].double(), b[1][b[2] == j].double()):
                    w2 = ((m - n) ** 2 + (s - t) ** 2).sum().sqrt()
                    kl = ((t / s).log() + (s ** 2 + (m - n) ** 2) / (2 * t ** 2) - 0.5).sum()
                    values.append((w2 if distance == "wasserstein" else kl).item())
            assert matrix[i, j].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert matrix.dtype == torch.float64


def test_absent_classes_and_other_distances_are_named():
    a, b = codes(12, 2, 4, 0), codes(12, 2, 3, 1)
    with pytest.raises(LitvaeError, match=r"class \[3\] in the second"): class_distances(*a, *b)
    with pytest.raises(LitvaeError, match=r"class \[3\] in the first"): class_distances(*b, *a)
    with pytest.raises(LitvaeError, match="'wasserstein' or 'kl'"): class_distances(*a, *a, distance="l1")


def test_average_linkage_equals_a_loop_over_clusters():
    rng = np.random.default_rng(0)
    matrix = rng.uniform(1, 9, (7, 7))
    symmetric = (matrix + matrix.T) / 2
    clusters, heights = [[i] for i in range(7)], []
    while len(clusters) > 1:
        gap = {(i, j): symmetric[np.ix_(clusters[i], clusters[j])].mean()
               for i in range(len(clusters)) for j in range(i)}
        i, j = min(gap, key=gap.get)
        heights.append(gap[i, j])
        clusters = [c for n, c in enumerate(clusters) if n not in (i, j)] + [clusters[i] + clusters[j]]
    assert np.allclose(class_linkage(torch.tensor(matrix))[:, 2], heights)
    assert sorted(dendrogram_order(matrix)) == list(range(7))


@pytest.mark.parametrize("matrix, words", [
    (torch.ones(3, 4), "square"), (torch.ones(1, 1), "two classes"), (torch.ones(3), "square"),
    (-torch.ones(3, 3), "not negative"), (torch.full((3, 3), math.nan), "finite")])
def test_bad_matrices_are_refused(matrix, words):
    with pytest.raises(LitvaeError, match=words): class_linkage(matrix)


def test_leaves_stand_beside_their_rows():
    import matplotlib.pyplot as plt
    matrix = torch.tensor(squareform([5.0, 1, 6, 6, 2, 7]))                              # 0-2 and 1-3 are close
    figure, axes = plt.subplots(1, 2)
    try:
        names = ["nought", "one", "two", "three"]
        order = draw_dendrogram(axes[1], matrix, names)
        image = draw_class_matrix(axes[0], matrix, names, order=order)
        labels = [[t.get_text() for t in axis.get_yticklabels()] for axis in axes]
        assert labels[0] == labels[1] == [names[i] for i in order]
        assert np.allclose(image.get_array(), matrix.numpy()[np.ix_(order, order)])
        assert axes[0].get_ylim() == axes[1].get_ylim() == (3.5, -0.5)
        assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
        with pytest.raises(LitvaeError, match="3 names for 4"): draw_class_matrix(axes[0], matrix, names[:3])
        with pytest.raises(LitvaeError, match="once"): draw_class_matrix(axes[0], matrix, order=[0, 1, 2])
        draw_relatedness(axes[0], relatedness(*codes(9, 2, 3, 0), *codes(9, 2, 3, 1)), bins=5)
    finally: plt.close(figure)


# ------------------------------------------------------------------------------------------------- latent accuracy
def probe_data(count, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.eye(5, 12) * 4
    labels = torch.randint(5, (count,), generator=generator)
    return centre[labels] + spread * torch.randn(count, 12, generator=generator), labels


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_the_probe_is_as_good_as_logistic_regression(spread):
    (z, y), (test_z, test_y) = probe_data(1500, 0, spread), probe_data(1000, 1, spread)
    judge = LogisticRegression(max_iter=5000).fit(z, y).score(test_z, test_y)
    assert latent_accuracy(z, y, test_z, test_y, learning_rate=1e-2) == pytest.approx(judge, abs=0.025)


def test_the_probe_repeats_itself_and_leaves_the_generator_alone():
    (z, y), (test_z, test_y) = probe_data(300, 0, 3.0), probe_data(400, 1, 3.0)
    before = torch.random.get_rng_state()
    with torch.no_grad(): first = latent_accuracy(z, y, test_z, test_y, epochs=2, batch_size=7)
    assert first == latent_accuracy(z, y, test_z, test_y, epochs=2, batch_size=7)
    assert torch.equal(before, torch.random.get_rng_state()) and not z.requires_grad
    assert 0 <= latent_accuracy(z[:3], y[:3], test_z, test_y, epochs=1) <= 1            # fewer codes than a batch


@pytest.mark.parametrize("arguments, words", [
    (lambda z, y: (z, y, z[:, :3], y), "differ in size"), (lambda z, y: (z, y[:9], z, y), "integers"),
    (lambda z, y: (z, y, z[:0], y[:0]), r"\(N, D\)"), (lambda z, y: (z * math.nan, y, z, y), "NaNs")])
def test_bad_probe_data_are_refused(arguments, words):
    z, y = probe_data(20, 0, 1.0)
    with pytest.raises(LitvaeError, match=words): latent_accuracy(*arguments(z, y))
    with pytest.raises(LitvaeError, match="positive"): latent_accuracy(z, y, z, y, epochs=0)


# ------------------------------------------------------------------------------------------------------------- CCA
def views(count=400, seed=0, shared=3, noise=0.5):
    rng = np.random.default_rng(seed)
    cause = rng.standard_normal((count, shared))
    return [torch.tensor(cause @ rng.standard_normal((shared, d)) + noise * rng.standard_normal((count, d)) + 3)
            for d in (8, 5)]


def test_correlations_equal_qr_and_svd():
    "The textbook form (Bjoerck & Golub, 1973): singular values between the orthogonal bases of both views."
    x, y = views()
    bases = [np.linalg.qr(v - v.mean(0))[0] for v in (x.numpy(), y.numpy())]
    judge = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    ours = Cca().fit(x, y, k=5, regularisation=0)
    assert np.allclose(ours.correlations, judge, atol=1e-10)
    assert np.allclose(Cca().fit(x, y, k=5).correlations, judge, atol=1e-3)             # the default hardly bends it
    px, py = ours.project(x, y)
    eye = torch.eye(5, dtype=torch.float64)
    for a, b, expected in ((px, px, eye), (py, py, eye), (px, py, torch.diag(ours.correlations))):
        assert torch.allclose(a.T @ b / (len(x) - 1), expected, atol=1e-9)


def test_scores_equal_equation_12_with_the_weights_of_scikit_learn():
    x, y = views(600)
    judge = CCA(3, scale=False, max_iter=10_000, tol=1e-14).fit(x[:400], y[:400])
    a, b = judge.transform(x[:400], y[:400])
    scales = a.std(0, ddof=1), b.std(0, ddof=1)                                         # unit variance, as ours
    a, b = judge.transform(x[400:], y[400:])
    a, b = a / scales[0], b / scales[1]
    expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    ours = Cca().fit(x[:400], y[:400], k=3, regularisation=0).correlation(x[400:], y[400:])
    assert ours.shape == (200,) and np.allclose(ours, expected, atol=1e-5)


def test_cca_does_not_care_for_scale_place_or_dead_features():
    x, y = views()
    expected = Cca().fit(x, y, k=3, regularisation=0).correlation(x, y)
    other = torch.cat([1e3 * x - 7, torch.full((len(x), 2), 4.0).double()], 1)
    assert torch.allclose(Cca().fit(other, y.float(), k=3, regularisation=0).correlation(other, y.float()), expected,
                          atol=1e-4)
    with pytest.raises(LitvaeError, match="1 to 5"): Cca().fit(other, y, k=6)
    copies = torch.cat([x, x], 1)                                                        # singular covariance
    assert torch.allclose(Cca().fit(copies, y, k=3).correlation(copies, y), expected, atol=1e-3)
    fitted = Cca().fit(x, y, k=3)
    assert fitted.correlation(fitted.mean_x[None], y[:1]).tolist() == [0]                # nothing left: 0, not NaN


def test_bad_views_are_refused():
    x, y = views()
    for bad, words in (((x, y[:9]), "in pairs"), ((x * math.nan, y), "NaNs"), ((x[0], y[0]), r"\(N, D\)"),
                       ((x[:1], y[:1]), "two pairs"), ((x, 0 * y), "1 to 0")):
        with pytest.raises(LitvaeError, match=words): Cca().fit(*bad, k=1)
    with pytest.raises(LitvaeError, match="regularisation"): Cca().fit(x, y, k=1, regularisation=-1)
    with pytest.raises(LitvaeError, match="call fit"): Cca().correlation(x, y)
    with pytest.raises(LitvaeError, match="8 and 5"): Cca().fit(x, y, k=1).correlation(y, x)


# ------------------------------------------------------------------------------------------------------- sentences
SENTENCES = [s.split() for s in ["a red bird sings", "a red bird flies", "a blue fish swims", "the blue fish dives",
                                 "the red bird swims", "a blue fish flies"] for _ in range(2)]


def slow_ppmi(sentences, words, window):
    "Counted pair by pair."
    counts = np.zeros((len(words), len(words)))
    for sentence in sentences:
        for i, first in enumerate(sentence):
            for j, second in enumerate(sentence):
                if i != j and abs(i - j) <= window: counts[words.index(first), words.index(second)] += 1
    result = np.zeros_like(counts)
    for i, row in enumerate(counts):
        for j, n in enumerate(row):
            if n: result[i, j] = max(0, math.log(n * counts.sum() / (row.sum() * counts[j].sum())))
    return result


@pytest.mark.parametrize("window", [1, 2, 9])
def test_word_vectors_factor_the_ppmi_matrix(window):
    embedder = SentenceEmbedder(SENTENCES, dimensions=50, window=window, min_count=1)
    left, values, _ = np.linalg.svd(slow_ppmi(SENTENCES, list(embedder.vocabulary), window))
    expected = (left * values) @ left.T                                                  # all vectors, any rotation
    assert np.allclose(embedder.vectors @ embedder.vectors.T, expected, atol=1e-10)
    few = SentenceEmbedder(SENTENCES, dimensions=2, window=window, min_count=1)
    assert np.allclose(np.linalg.norm(few.vectors, axis=0) ** 2, values[:2])


def test_average_and_sif_follow_their_formulas():
    plain = SentenceEmbedder(SENTENCES, dimensions=4, min_count=2)
    vector = lambda word: plain.vectors[plain.vocabulary[word]]
    found = sentence_embeddings([["red", "fish", "unheard"], [], ["a"]], plain)
    assert np.allclose(found[0], (vector("red") + vector("fish")) / 2) and np.allclose(found[2], vector("a"))
    assert found[1].tolist() == [0] * 4
    total = sum(map(len, SENTENCES))
    share = {w: sum(s.count(w) for s in SENTENCES) / total for w in plain.vocabulary}
    means = np.array([np.mean([vector(w) * 0.01 / (0.01 + share[w]) for w in s], 0) for s in SENTENCES])
    first = np.linalg.svd(means)[2][0]
    sif = sentence_embeddings(SENTENCES, dimensions=4, min_count=2, weights="sif", a=0.01)
    assert np.allclose(sif, means - np.outer(means @ first, first), atol=1e-10)


def test_ids_and_words_give_the_same_sentences():
    words = sorted({w for s in SENTENCES for w in s})
    ids = torch.ones(len(SENTENCES), 9, dtype=torch.int64)
    for row, sentence in zip(ids, SENTENCES): row[:len(sentence)] = torch.tensor([3 + words.index(w) for w in sentence])
    a = sentence_embeddings(ids, dimensions=50, min_count=1, ignore=(0, 1, 2))
    b = sentence_embeddings(SENTENCES, dimensions=50, min_count=1)
    assert torch.allclose(a @ a.T, b @ b.T, atol=1e-10)


@pytest.mark.parametrize("call, words", [
    (lambda: sentence_embeddings("a red bird"), "split it"), (lambda: sentence_embeddings(["red"]), "split it"),
    (lambda: sentence_embeddings(torch.ones(3, 4).long()), "ignore="), (lambda: sentence_embeddings([]), "near"),
    (lambda: sentence_embeddings(torch.ones(3, 4), ignore=()), "integers"),
    (lambda: SentenceEmbedder([["a"], ["b"]], min_count=1), "near"),
    (lambda: SentenceEmbedder(SENTENCES, weights="bm25"), "'average' or 'sif'"),
    (lambda: SentenceEmbedder(SENTENCES, window=0), "1 or more"),
    (lambda: sentence_embeddings(SENTENCES, SentenceEmbedder(SENTENCES), window=2), "its own options")])
def test_bad_sentences_are_refused(call, words):
    with pytest.raises(LitvaeError, match=words): call()


# ------------------------------------------------------------------------------------- gradients and likelihoods
def test_gradient_snr_of_a_known_estimator():
    "Gradient of (z w)^2 / 2 with z = 1 + s e: its mean and spread are known, and finite differences give the gradient."
    generator, w, s = torch.Generator().manual_seed(0), torch.tensor([0.5, -2.0], dtype=torch.float64), 0.3
    z = 1 + s * torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    loss = lambda w: (z * w).square().sum(1) / 2
    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    samples = torch.stack([(loss(w + d) - loss(w - d)) / 2e-5 for d in step], 1)         # (R, P): z^2 w
    variance = 4 * s ** 2 + 2 * s ** 4                                                   # of z^2
    found = gradient_snr(samples)
    assert np.allclose(found["per_parameter"], (1 + s ** 2) / math.sqrt(variance), rtol=0.02)
    assert found["mean"] == pytest.approx(found["per_parameter"].mean().item()) and found["dead"] == 0


@pytest.mark.parametrize("repeats", [3, 5, 30])
def test_the_floor_is_what_pure_noise_scores(repeats):
    samples = torch.randn(repeats, 300_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = gradient_snr(7 * samples)
    middle = found["per_parameter"].clamp(max=50)                                        # R = 3 has a heavy tail
    assert found["floor"] == pytest.approx(middle.mean().item(), rel=0.02)


def test_gradients_without_noise_or_signal():
    third = gradient_snr(torch.tensor([[0.0, 0.1], [0.0, 0.1], [0.0, 0.1]]))
    assert third["dead"] == 1 and third["per_parameter"][1] == math.inf and math.isnan(third["per_parameter"][0])
    assert math.isnan(gradient_snr(torch.zeros(4, 3))["mean"]) and gradient_snr(torch.zeros(2, 3))["floor"] == math.inf
    for bad in (torch.zeros(1, 3), torch.zeros(3), torch.zeros(3, 2).long(), torch.full((3, 2), math.nan)):
        with pytest.raises(LitvaeError): gradient_snr(bad)


def test_importance_weights_reach_the_evidence_of_a_linear_gaussian():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-1.0, 0.5, 3.0]).double()
    z = 1.3 * torch.randn(200_000, 3, generator=generator, dtype=torch.float64) + 0.3 * x
    normal = lambda x, mean, std: -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
    log_weights = normal(z, 0, 1) + normal(x, 2 * z, 0.7) - normal(z, 0.3 * x, 1.3)
    evidence = normal(x, 0, math.sqrt(4 + 0.49))
    assert torch.allclose(importance_log_likelihood(log_weights), evidence, atol=0.02)
    few = importance_log_likelihood(log_weights[:200_000 // 5 * 5].reshape(5, -1))       # on average below, by Jensen
    assert few.reshape(-1, 3).mean(0).lt(evidence).all()
    weights = np.exp(log_weights.numpy())
    assert np.allclose(effective_sample_size(log_weights), weights.sum(0) ** 2 / (weights ** 2).sum(0))


def test_extreme_weights():
    log_weights = torch.tensor([[-1e5, -2e5], [-1e5, -math.inf], [-math.inf, -math.inf]])
    assert np.allclose(importance_log_likelihood(log_weights), [-1e5 + math.log(2 / 3), -2e5 - math.log(3)], rtol=1e-12)
    assert np.allclose(effective_sample_size(log_weights), [2, 1])
    one = torch.tensor([[-3.0]])
    assert importance_log_likelihood(one).item() == -3 and effective_sample_size(one).item() == 1
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 2).long(), torch.full((2, 2), math.inf),
                torch.full((2, 2), math.nan)):
        with pytest.raises(LitvaeError, match="log weights"): importance_log_likelihood(bad)
        with pytest.raises(LitvaeError, match="log weights"): effective_sample_size(bad)


# --------------------------------------------------------------------------------------------------------- t-SNE
def test_tsne_keeps_clusters_and_repeats_itself():
    z, labels = probe_data(80, 0, 0.3)
    at = tsne(z, perplexity=10)
    assert at.shape == (80, 2) and torch.equal(at, tsne(z, perplexity=10))
    nearest = (torch.cdist(at, at) + 1e9 * torch.eye(80)).argmin(1)
    assert (labels[nearest] == labels).float().mean() > 0.95
    with pytest.raises(LitvaeError, match="perplexity"): tsne(z[:10], perplexity=10)


@pytest.mark.parametrize("package, call", [
    ("sklearn.manifold", lambda: tsne(torch.randn(40, 3), perplexity=5)),
    ("gpytorch", lambda: fit_gaussian_process(DigitClassifier(1, 16), *bars(70, 0)))])
def test_absent_packages_are_named(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LitvaeError, match=r"pip install (scikit-learn|gpytorch)"): call()


# --------------------------------------------------------------------------------------------------- classifiers
def bars(count, seed, size=16, noise=0.15):
    "Pictures of four classes: a bright bar at one of four heights, in noise."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = noise * torch.rand(count, 1, size, size, generator=generator)
    for image, label in zip(images, labels): image[0, 4 * label + 1:4 * label + 3] += 0.8
    return images, labels


@pytest.fixture(scope="module")
def judge():
    return train_classifier(*bars(200, 0), steps=60, learning_rate=5e-3, classes=4)


def test_the_networks_of_the_paper():
    for channels, size, inputs in ((1, 28, 320), (3, 32, 500)):
        model = DigitClassifier(channels, size)
        shapes = [tuple(p.shape) for p in model.parameters()]
        assert shapes == [(10, channels, 5, 5), (10,), (20, 10, 5, 5), (20,), (50, inputs), (50,), (10, 50), (10,)]
        model.train()
        x = torch.rand(3, channels, size, size)
        assert not torch.equal(model(x), model(x))                                       # dropout at work
        assert torch.equal(classify(model, x), classify(model, x)) and model.training
        assert torch.equal(model.eval()(x), model(x)) and model.features(x).shape == (3, 50)


def test_training_learns_and_repeats_itself(judge):
    assert classifier_accuracy(judge, *bars(100, 1)) == coherence(judge, *bars(100, 1)) > 0.95
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a, b, c = (train_classifier(*bars(50, 0), epochs=1, batch_size=20, seed=seed, classes=4) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a.last.weight, b.last.weight) and not torch.equal(a.last.weight, c.last.weight)


def test_bytes_and_floats_are_the_same_pictures(judge):
    images, labels = bars(40, 2)
    images = (images * 255).round()
    assert torch.allclose(judge(images.byte()), judge(images / 255))


def test_coherence_counts(judge):
    images, labels = bars(40, 2)
    guess = classify(judge, images)
    labels = torch.where(torch.arange(40) < 10, guess, (guess + 1) % 4)
    assert coherence(judge, images, labels) == 0.25


@pytest.mark.parametrize("images, words", [
    (torch.rand(4, 3, 16, 16), r"\(N, 1, 16, 16\)"), (torch.rand(4, 1, 16, 17), r"\(N, C, S, S\)"),
    (torch.rand(4, 16, 16), r"\(N, C, S, S\)"), (2 * torch.rand(4, 1, 16, 16) + 1, r"\[0, 1\]"),
    (torch.rand(4, 1, 16, 16) * math.nan, r"\[0, 1\]"), (torch.ones(4, 1, 16, 16).long(), "floats or uint8"),
    (torch.rand(0, 1, 16, 16), "not empty")])
def test_bad_images_are_refused(judge, images, words):
    labels = torch.zeros(len(images), dtype=torch.int64)
    with pytest.raises(LitvaeError, match=words): coherence(judge, images, labels)


def test_bad_training_is_refused():
    images, labels = bars(20, 0)
    for arguments, words in (((images, labels[:3]), "20 integers"), ((images, labels.float()), "integers"),
                             ((images, labels - 1), "negative"), ((images, labels + 9), "not one of 10"),
                             ((images[..., :12, :12], labels), "16 pixels"), ((images - 1, labels), r"\[0, 1\]")):
        with pytest.raises(LitvaeError, match=words): train_classifier(*arguments, steps=1)
    with pytest.raises(LitvaeError, match="nothing to train"): train_classifier(images, labels, epochs=0)
    with pytest.raises(LitvaeError, match="nothing to train"): train_classifier(images, labels, batch_size=0)


# -------------------------------------------------------------------------------------------- the stored classifier
@pytest.fixture
def stored(tmp_path):
    sets = *bars(60, 0), *bars(20, 1)
    ask = lambda folder=tmp_path, sets=sets, **recipe: stored_classifier(folder, *sets,
                                                                         **({"steps": 5, "classes": 4} | recipe))
    ask()
    return ask, tmp_path, *(next(tmp_path.glob(f"*.{end}")) for end in ("json", "safetensors"))


def test_a_stored_classifier_is_read_not_trained(stored, monkeypatch):
    ask, folder, description, weights = stored
    record = json.loads(description.read_text())
    monkeypatch.setattr(classifiers, "train_classifier", lambda *a, **k: pytest.fail("trained again"))
    torch.manual_seed(1)
    model, again = ask()
    images, labels = bars(20, 1)
    assert again == record and not model.training and again["recipe"]["steps"] == 5
    assert record["accuracy"] == classifier_accuracy(model, images, labels)
    state = safetensors.torch.load_file(weights)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not [p for p in folder.iterdir() if ".tmp." in p.name]


def test_other_data_or_another_recipe_is_another_classifier(stored):
    ask, folder, description, weights = stored
    images, labels, *validation = *bars(60, 0), *bars(20, 1)
    changed = images.clone()
    changed[7, 0, 3, 3] += 0.01
    ask(sets=(changed, labels, *validation)), ask(sets=(images, labels.flip(0), *validation)), ask(seed=1)
    assert len(list(folder.glob("*.json"))) == len(list(folder.glob("*.safetensors"))) == 4
    ask()
    assert len(list(folder.glob("*.json"))) == 4


def flip(data): return data[:-5] + bytes([data[-5] ^ 4]) + data[-4:]


@pytest.mark.parametrize("spoil", [
    lambda j, w: w.write_bytes(flip(w.read_bytes())), lambda j, w: w.write_bytes(w.read_bytes()[:200]),
    lambda j, w: w.write_bytes(b""), lambda j, w: w.unlink(), lambda j, w: j.write_text("{"),
    lambda j, w: j.write_text("[]"), lambda j, w: j.write_text(j.read_text().replace("weights_sha256", "weights")),
    lambda j, w: j.write_bytes(b"\xff\xfe")])
def test_damage_is_reported_and_nothing_is_deleted(stored, spoil):
    ask, folder, description, weights = stored
    spoil(description, weights)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CorruptFileError, match="move .* away|delete"): ask()
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_weights_of_another_shape_are_corrupt(stored):
    import hashlib
    ask, folder, description, weights = stored
    state = safetensors.torch.load_file(weights)
    weights.write_bytes(safetensors.torch.save(state | {"last.bias": torch.zeros(7)}))
    record = json.loads(description.read_text())
    record["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    description.write_text(json.dumps(record))
    with pytest.raises(CorruptFileError, match="last.bias"): ask()


def test_a_pickle_in_place_of_the_weights_is_never_run(stored, tmp_path):
    import hashlib, pickle
    ask, folder, description, weights = stored
    class Bomb:
        def __reduce__(self): return (tmp_path.joinpath("exploded").write_text, ("!",))
    weights.write_bytes(pickle.dumps(Bomb()))
    record = json.loads(description.read_text())
    record["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    description.write_text(json.dumps(record))
    with pytest.raises(CorruptFileError): ask()
    assert not (tmp_path / "exploded").exists()


def test_without_its_description_a_classifier_is_trained_again(stored):
    ask, folder, description, weights = stored
    before = weights.read_bytes()
    description.unlink(), weights.write_bytes(b"half")
    ask()
    assert description.exists() and weights.read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path, stored):
    (tmp_path / "file").write_text("")
    with pytest.raises(LitvaeError, match="a file stands where"): stored[0](folder=tmp_path / "file")
    with pytest.raises(LitvaeError, match="a file stands where"): stored[0](folder=tmp_path / "file" / "below")


# ------------------------------------------------------------------------------------------ predictive information
class Fixed(GaussianProcessHead):
    "A head whose posterior is given."
    def __init__(self, mean, std): torch.nn.Module.__init__(self), setattr(self, "given", (mean, std))
    def marginals(self, images): return self.given


def test_information_of_a_binary_label_equals_an_integral():
    "Two classes: only f_1 - f_0 ~ N(m, s_0^2 + s_1^2) matters, and one integral over it gives both entropies."
    mean = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.5], [0.0, 3.0]])
    std = torch.tensor([[1.0, 2.0], [0.5, 0.5], [3.0, 0.1], [1e-6, 1e-6]])
    found = predictive_information(Fixed(mean, std), torch.zeros(4), samples=40_000)
    entropy = lambda p: -(p * np.log(p) + (1 - p) * np.log1p(-p))
    for value, m, s in zip(found, mean.double().numpy(), std.double().numpy()):
        spread = math.hypot(*s)
        d = np.linspace(m[1] - m[0] - 9 * spread, m[1] - m[0] + 9 * spread, 20_001)
        density = np.exp(-0.5 * ((d - m[1] + m[0]) / spread) ** 2)
        density /= density.sum()
        p = (1 / (1 + np.exp(-d))).clip(1e-15, 1 - 1e-15)
        assert value.item() == pytest.approx(entropy((density * p).sum()) - (density * entropy(p)).sum(), abs=0.006)


def test_information_is_bounded():
    mean, std = torch.zeros(2, 10), torch.tensor([[1e4], [0.0]]).expand(2, 10)
    most, none = predictive_information(Fixed(mean, std), torch.zeros(2), samples=5000)
    assert most.item() == pytest.approx(math.log(10), abs=0.01) and most <= math.log(10) and none < 1e-12


def test_information_equals_that_of_a_table():
    "With a prior of few settings of the parameters the score is the mutual information of a joint table."
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.25, 0.5, 0.25]], dtype=torch.float64)
    class Four(Fixed):
        def marginals(self, images): return torch.zeros(1, 3), torch.ones(1, 3)
    noise = p.log().unsqueeze(1)                                                         # (4 samples, 1 image, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, generator: noise)
        found = predictive_information(Four(None, None), torch.zeros(1), samples=4)
    table = (20 * p).round().long().numpy()
    assert found.item() == pytest.approx(mutual_info_score(None, None, contingency=table), abs=1e-12)


@pytest.fixture(scope="module")
def head(judge): return fit_gaussian_process(judge, *bars(200, 0), inducing=16, steps=60, learning_rate=0.05)


def test_the_process_classifies_and_prefers_real_pictures(judge, head):
    images, labels = bars(60, 5)
    mean, std = head.marginals(images)
    assert mean.shape == std.shape == (60, 4) and (std > 0).all()
    assert (mean.argmax(1) == labels).float().mean() > 0.9
    real = predictive_information(head, images)
    mixed = predictive_information(head, (images + images.roll(1, 0)) / 2)
    assert real.mean() < 0.7 * mixed.mean() and real.shape == (60,) and real.min() >= 0
    assert torch.equal(real, predictive_information(head, images)) and not real.requires_grad
    assert not torch.equal(real, predictive_information(head, images, seed=1))


def test_the_process_repeats_itself_and_leaves_the_judge_alone(judge):
    before = [p.clone() for p in judge.parameters()]
    state = torch.random.get_rng_state()
    a, b = (fit_gaussian_process(judge, *bars(60, 0), inducing=8, steps=3) for _ in range(2))
    assert torch.equal(a.marginals(bars(9, 1)[0])[0], b.marginals(bars(9, 1)[0])[0])
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(before, judge.parameters()))


def test_bad_information_is_refused(judge, head):
    images, labels = bars(20, 0)
    with pytest.raises(LitvaeError, match="two samples"): predictive_information(head, images, samples=1)
    with pytest.raises(LitvaeError, match="no image"): predictive_information(head, images[:0])
    with pytest.raises(LitvaeError, match=r"\[0, 1\]"): predictive_information(head, images * 3)
    with pytest.raises(LitvaeError, match="20 images"): fit_gaussian_process(judge, images, labels, inducing=21)
    with pytest.raises(LitvaeError, match="20 integers"): fit_gaussian_process(judge, images, labels[:3], inducing=2)
    with pytest.raises(LitvaeError, match="not one of 4"): fit_gaussian_process(judge, images, labels + 3, inducing=2)
