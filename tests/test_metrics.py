"Segmentation metrics on hard cases: scikit-learn and slow loops as judges, odd inputs, clear errors."
import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

from litvae.core.files import LitvaeError
from litvae.core.metrics import (active_slots, adjusted_rand_index, contingency_tables, segmentation_baselines,
                                 segmentation_covering, segmentation_scores)

FORMS = [(False, False), (False, True), (True, False), (True, True)]                   # (foreground_only, weighted)


def close(a, b): return np.allclose(a, b, rtol=0, atol=1e-12)


def random_maps(rng):
    "A batch of true and predicted maps: any size, few or many labels, unrelated or nearly equal predictions."
    shape = (rng.integers(1, 5), rng.integers(1, 14), rng.integers(1, 14))
    true = rng.integers(0, rng.integers(1, rng.choice([3, 8, 201])), shape)
    pred = rng.integers(0, rng.integers(1, rng.choice([3, 8, 201])), shape)
    return true, np.where(rng.random(shape) < rng.choice([0, 0.5, 0.95]), true, pred)


def judge_ari(true, pred, foreground_only=False):
    "scikit-learn, one image after the other."
    kept = [(t > 0) if foreground_only else (t >= 0) for t in true]
    return [adjusted_rand_score(t[k], p[k]) for t, p, k in zip(true, pred, kept)]


def judge_covering(true, pred, foreground_only=False, weighted=False):
    "Sets of pixel numbers, one image after the other; no arrays."
    result = []
    for t, p in zip(true.reshape(len(true), -1).tolist(), pred.reshape(len(pred), -1).tolist()):
        regions, slots = {}, {}
        for i, (r, c) in enumerate(zip(t, p)):
            if r < 0: continue
            regions.setdefault(r, set()).add(i)
            slots.setdefault(c, set()).add(i)
        if foreground_only: regions.pop(0, None)
        best = {r: max(len(x & s) / len(x | s) for s in slots.values()) for r, x in regions.items()}
        weight = {r: len(x) if weighted else 1 for r, x in regions.items()}
        result.append(sum(weight[r] * best[r] for r in regions) / sum(weight.values()) if regions else 0.0)
    return result


@pytest.mark.parametrize("foreground_only", [False, True])
def test_ari_equals_scikit_learn_on_hundreds_of_maps(foreground_only):
    rng = np.random.default_rng(1)
    for _ in range(200):
        true, pred = random_maps(rng)
        ours = adjusted_rand_index(true, pred, foreground_only)
        assert ours.dtype == np.float64 and ours.shape == (len(true),)
        assert close(ours, judge_ari(true, pred, foreground_only)), (true, pred)


@pytest.mark.parametrize("foreground_only, weighted", FORMS)
def test_covering_equals_the_loop_on_random_maps(foreground_only, weighted):
    rng = np.random.default_rng(2)
    for _ in range(40):
        true, pred = random_maps(rng)
        true = true - rng.integers(0, 2)                           # every other time with pixels to ignore
        ours = segmentation_covering(true, pred, foreground_only, weighted)
        assert ours.dtype == np.float64 and ours.shape == (len(true),)
        assert close(ours, judge_covering(true, pred, foreground_only, weighted)), (true, pred)


def test_tables_hold_the_counts_of_scikit_learn():
    rng = np.random.default_rng(3)
    for _ in range(50):
        true, pred = random_maps(rng)
        tables = contingency_tables(true, pred)
        assert tables.dtype == np.int64 and (tables.sum((1, 2)) == true[0].size).all()
        for table, t, p in zip(tables, true, pred):
            full = table[table.any(1)][:, table.any(0)]
            assert (full == contingency_matrix(t.ravel(), p.ravel())).all()
            assert (table[0].sum(), table[:, 0].sum()) == ((t == 0).sum(), (p == 0).sum())


def test_each_image_is_scored_alone():
    rng = np.random.default_rng(4)
    true, pred = rng.integers(0, 6, (2, 20, 9, 7))
    true[3], true[5], pred[7], pred[9] = 0, 190, 44, rng.integers(0, 63, (9, 7))
    whole = segmentation_scores(true, pred)
    for i in range(20):
        alone = segmentation_scores(true[i:i + 1], pred[i:i + 1])
        for name in whole: assert close(alone[name][0], whole[name][i]), name


def test_names_of_slots_do_not_matter():
    rng = np.random.default_rng(5)
    for _ in range(50):
        true, pred = random_maps(rng)
        names = rng.permutation(1000)[:201] * 10 ** 12                 # a new name for each slot, far apart
        before, after = segmentation_scores(true, pred), segmentation_scores(true, names[pred])
        for key in before: assert close(before[key], after[key])
        renamed = np.where(true > 0, names[true] + 1, 0)                               # the background keeps its 0
        after = segmentation_scores(renamed, pred)
        for key in before: assert close(before[key], after[key])


def test_ari_is_symmetric_and_bounded():
    rng = np.random.default_rng(6)
    for _ in range(100):
        true, pred = random_maps(rng)
        ari = adjusted_rand_index(true, pred)
        assert close(ari, adjusted_rand_index(pred, true)) and (ari <= 1).all() and (ari >= -1).all()
        assert (adjusted_rand_index(true, true) == 1).all() and (segmentation_covering(true, true) == 1).all()


def test_one_pixel_images():
    for true in (0, 1, 7):
        for pred in (0, 3):
            t, p = np.full((1, 1, 1), true), np.full((1, 1, 1), pred)
            assert adjusted_rand_index(t, p) == adjusted_rand_index(t, p, True) == 1
            assert segmentation_covering(t, p) == 1 and segmentation_covering(t, p, True) == (true > 0)
    nothing = np.full((1, 1, 1), -1)
    assert adjusted_rand_index(nothing, p) == 1 and segmentation_covering(nothing, p) == 0


def test_images_of_background_only():
    true, pred = np.zeros((2, 6, 5), int), np.zeros((2, 6, 5), int)
    pred[1, :3] = 1
    assert adjusted_rand_index(true, pred).tolist() == [1, 0]
    assert adjusted_rand_index(true, pred, foreground_only=True).tolist() == [1, 1]
    assert segmentation_covering(true, pred).tolist() == [1, 0.5]
    for weighted in (False, True): assert segmentation_covering(true, pred, True, weighted).tolist() == [0, 0]


def test_degenerate_foregrounds():
    true = np.zeros((1, 8, 8), int)
    true[0, 2:4, 2:6] = 5
    split = true.copy()
    split[0, 2:4, 4:6] = 9
    assert adjusted_rand_index(true, 0 * true, True) == [1.0] and adjusted_rand_index(true, split, True) == [0.0]
    assert segmentation_covering(true, 0 * true, True) == [8 / 64] and segmentation_covering(true, split, True) == [0.5]


def test_no_image_at_all():
    empty = np.zeros((0, 4, 4), int)
    assert contingency_tables(empty, empty).shape[0] == 0
    for name, value in segmentation_scores(empty, empty).items():
        assert value.shape == (0,) and value.dtype == np.float64, name
    with pytest.raises(LitvaeError, match="at least one"): segmentation_baselines(empty)
    with pytest.raises(LitvaeError, match="at least one"): active_slots(empty, 3)


def test_large_images_do_not_overflow():
    rng = np.random.default_rng(7)
    true = rng.integers(0, 2, (1, 1500, 1500))                         # products of pair counts exceed 2 ** 64
    pred = np.where(rng.random(true.shape) < 0.3, 1, true)
    assert close(adjusted_rand_index(true, pred), judge_ari(true, pred))
    inside = np.zeros_like(true)
    assert adjusted_rand_index(true, inside) == [0.0]


def test_ignored_pixels_are_as_if_cut_away():
    rng = np.random.default_rng(8)
    for _ in range(50):
        true, pred = rng.integers(-2, 4, (3, 6, 6)), rng.integers(0, 4, (3, 6, 6))
        assert close(adjusted_rand_index(true, pred), judge_ari(true, pred))
        assert close(adjusted_rand_index(true, pred, True), judge_ari(true, pred, True))
        for t, p in zip(true, pred):
            kept = t >= 0
            if not kept.any(): continue
            line = segmentation_covering(t[kept][None, None], p[kept][None, None])
            assert close(segmentation_covering(t[None], p[None]), line)


def test_tensors_and_arrays_agree_and_keep_their_kind():
    rng = np.random.default_rng(9)
    true, pred = rng.integers(0, 9, (2, 5, 6, 7))
    expected = segmentation_scores(true, pred)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        t, p = torch.tensor(true).to(dtype), torch.tensor(pred).to(dtype)
        for pair in ((t, p), (true, p), (t, pred)):
            for name, value in segmentation_scores(*pair).items():
                assert isinstance(value, torch.Tensor) and value.dtype == torch.float64 and close(value, expected[name])
    assert isinstance(contingency_tables(torch.tensor(true), pred), torch.Tensor)
    for dtype in ("u1", "u2", "i2", "i4", ">i4", "u8"):
        for name, value in segmentation_scores(true.astype(dtype), pred.astype(dtype)).items():
            assert isinstance(value, np.ndarray) and value.dtype == np.float64 and close(value, expected[name])


def test_boolean_predictions():
    true = np.random.default_rng(10).integers(0, 4, (6, 5, 5))
    for figure in (true > 0, torch.tensor(true > 0)):
        assert close(segmentation_covering(true, figure), judge_covering(true, np.asarray(figure)))


def test_views_and_read_only_inputs(tmp_path):
    rng = np.random.default_rng(11)
    true, pred = rng.integers(0, 5, (2, 6, 8, 8))
    expected = adjusted_rand_index(true[::2, ::-1, 1::2], pred[::2, ::-1, 1::2].copy())
    assert close(expected, judge_ari(true[::2, ::-1, 1::2], pred[::2, ::-1, 1::2]))
    assert close(adjusted_rand_index(np.asfortranarray(true), pred), adjusted_rand_index(true, pred))
    t, p = torch.tensor(true).permute(0, 2, 1), torch.tensor(pred).transpose(1, 2)
    assert not t.is_contiguous() and close(adjusted_rand_index(t, p), adjusted_rand_index(true, pred))
    every_other = segmentation_covering(torch.tensor(true)[::2], torch.tensor(pred)[::2])
    assert close(every_other, segmentation_covering(true, pred)[::2])
    np.save(tmp_path / "mask.npy", true.astype("u1"))
    mapped = np.load(tmp_path / "mask.npy", mmap_mode="r")
    assert close(adjusted_rand_index(mapped, pred), adjusted_rand_index(true, pred))


def test_inputs_stay_as_they_are():
    true, pred = torch.tensor([[[-1, 0], [3, 3]]]), torch.tensor([[[2, 2], [2, 0]]])
    before = true.clone(), pred.clone()
    segmentation_scores(true, pred)
    segmentation_baselines(true)
    assert torch.equal(true, before[0]) and torch.equal(pred, before[1])


@pytest.mark.parametrize("score", [adjusted_rand_index, segmentation_covering, contingency_tables, segmentation_scores])
@pytest.mark.parametrize("true, pred, message", [
    (np.zeros((2, 4, 4)), np.zeros((2, 4, 4), int), "true labels must be integers, got float64"),
    (np.zeros((2, 4, 4), int), np.zeros((2, 4, 4), np.float32), "predicted labels must be integers, got float32"),
    (torch.zeros(2, 4, 4), torch.zeros(2, 4, 4).long(), "true labels must be integers, got torch.float32"),
    (np.zeros((2, 4, 4), int), np.zeros((2, 4, 4), complex), "must be integers"),
    (np.zeros((4, 4), int), np.zeros((4, 4), int), r"\(N, H, W\), got \(4, 4\)"),
    (np.zeros((2, 16), int), np.zeros((2, 16), int), r"\(N, H, W\), got \(2, 16\)"),
    (np.zeros((2, 4, 4, 1), int), np.zeros((2, 4, 4), int), r"true labels .* got \(2, 4, 4, 1\)"),
    (torch.zeros(2, 4, 4).long(), torch.zeros(2, 5, 4, 4).long(), r"predicted labels .* got \(2, 5, 4, 4\)"),
    (np.zeros((2, 4, 4), int), np.zeros((1, 4, 4), int), r"one shape, got \(2, 4, 4\) and \(1, 4, 4\)"),
    (np.zeros((2, 4, 4), int), np.zeros((2, 2, 8), int), "one shape"),
    (np.zeros((2, 4, 4), int), np.full((2, 4, 4), -1), "must not be negative"),
    ([[[0, 1]]], np.zeros((1, 1, 2), int), "numpy array or a tensor, got list"),
    (np.zeros((1, 1, 2), int), None, "predicted labels must be a numpy array or a tensor, got NoneType"),
])
def test_bad_input_gets_one_clear_error(score, true, pred, message):
    with pytest.raises(LitvaeError, match=message): score(true, pred)


def test_baselines_are_the_scores_of_the_two_empty_handed_predictions():
    rng = np.random.default_rng(12)
    true = rng.integers(0, 3, (40, 6, 6)) * (rng.random((40, 1, 1)) < 0.8)
    for maps in (true, torch.tensor(true)):
        found = segmentation_baselines(maps)
        for name, pred in (("one component", 0 * true), ("foreground/background", (true > 0).astype(int))):
            judges = {"ari": judge_ari(true, pred), "ari_fg": judge_ari(true, pred, True),
                      "msc": judge_covering(true, pred), "msc_fg": judge_covering(true, pred, True)}
            for key, values in judges.items(): assert close(found[name][key], np.mean(values)), (name, key)
            assert all(type(value) is float for value in found[name].values())
    with pytest.raises(LitvaeError, match="integers"): segmentation_baselines(true / 2)


def test_active_slots_counts_strictly_more_than_the_threshold():
    rng = np.random.default_rng(13)
    for _ in range(50):
        slots, threshold = int(rng.integers(1, 9)), rng.choice([0.0, 0.01, 0.1, 0.5])
        pred = rng.integers(0, rng.integers(1, slots + 1), (4, 5, 8))
        slow = np.mean([sum((p == k).sum() > threshold * 40 for k in range(slots)) for p in pred])
        assert active_slots(pred, slots, threshold) == active_slots(torch.tensor(pred), slots, threshold) == slow
    four = np.arange(4).reshape(1, 2, 2)
    with pytest.raises(LitvaeError, match="numbered 0 to 2, got labels from 0 to 3"): active_slots(four, 3)
    with pytest.raises(LitvaeError, match="numbered"): active_slots(np.full((1, 2, 2), -1), 3)
    with pytest.raises(LitvaeError, match="integers"): active_slots(torch.zeros(1, 2, 2), 3)
