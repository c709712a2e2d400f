"""Pictures of repeated parts: what is drawn where, what is visible, the cells, sizes, levels, shards, names."""
import math

import numpy as np
import pytest
import torch
from matplotlib.path import Path

from litvae.core.files import LitvaeError
from litvae.data import load
from litvae.data.parts import CLASSES, LEVELS, PARTS, draw_parts, part_cells, parts21_proc

STAR = [((1.8 if k % 2 else 4.2) * math.sin(k * math.pi / 5), -(1.8 if k % 2 else 4.2) * math.cos(k * math.pi / 5))
        for k in range(10)]
TRIANGLE = [(4.2 * math.sin(k * 2 * math.pi / 3), -4.2 * math.cos(k * 2 * math.pi / 3)) for k in range(3)]


def box(x, y, width, height): return (abs(x) <= width) & (abs(y) <= height)

def polygon(corners):
    path = Path(corners)
    return lambda x, y: path.contains_points(np.stack([x.ravel(), y.ravel()], -1)).reshape(x.shape)


INSIDE = {"disc": lambda x, y: x**2 + y**2 <= 3.3**2, "square": lambda x, y: box(x, y, 2.9, 2.9),
          "triangle": polygon(TRIANGLE), "star": polygon(STAR),
          "cross": lambda x, y: box(x, y, 3.4, 1.1) | box(x, y, 1.1, 3.4),
          "ring": lambda x, y: (x**2 + y**2 <= 3.5**2) & (x**2 + y**2 >= 1.9**2),
          "double bar": lambda x, y: box(x, y - 1.9, 3.3, 0.85) | box(x, y + 1.9, 3.3, 0.85)}


def owners(look, image, size):
    "Which slot is on top in each pixel, -1 for none, by painting whole pictures part by part."
    top = np.full((size, size), -1)
    rows, columns = np.mgrid[:size, :size] + 0.5
    for slot, part in enumerate(look["part_type"][image]):
        if part == 255: continue
        (cx, cy), tilt = look["part_centre"][image, slot], look["tilt"][image, slot]
        length = size / 32 * look["scale"][image, slot]
        x, y = (columns - cx) / length, (rows - cy) / length
        turned = math.cos(tilt) * x + math.sin(tilt) * y, math.cos(tilt) * y - math.sin(tilt) * x
        top[INSIDE[PARTS[part]](*turned)] = slot
    return top


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_parts_are_where_they_are_said_to_be(level, size):
    look = draw_parts(np.random.default_rng(3), 40, level, size)
    found = parts21_proc(np.random.default_rng(3), 40, level=level, size=size)
    positive = np.zeros((40, 7, 4, 4), bool)
    for image in range(40):
        top = owners(look, image, size)
        counted = np.array([(top == slot).sum() for slot in range(8)])
        assert abs(counted - found["part_visible"][image].astype(int)).max() <= 1  # a pixel on the very edge
        for slot, part in enumerate(found["part_type"][image]):
            x, y = found["part_centre"][image, slot]
            if part != 255 and found["part_visible"][image, slot] >= 6 * (size / 32) ** 2:
                positive[image, part, int(y / (size / 4)), int(x / (size / 4))] = True
            inner = (top == slot) & np.all([np.roll(top, step, axis) == slot for axis in (0, 1) for step in (-1, 1)], 0)
            if part == 255 or inner.sum() < 4: continue
            colour = 255 * look["colour"][image, slot].clip(0, 1)
            painted = found["image"][image][inner].astype(float)
            assert abs(painted - colour).max(-1).min() <= 1  # edges are blended
    cells = part_cells(found)
    assert cells.dtype == torch.bool and np.array_equal(cells.numpy(), positive)
    assert np.array_equal(part_cells(found, [7, 3]).numpy(), positive[[7, 3]])


def test_class_is_the_pair():
    found = parts21_proc(np.random.default_rng(0), 2100)
    for label, parts in zip(found["label"], found["part_type"]):
        kinds, copies = np.unique(parts[parts != 255], return_counts=True)
        assert CLASSES[label] == ", ".join(PARTS[kind] for kind in kinds) and len(kinds) == 2
        assert copies.min() >= 2 and copies.max() <= 4
    count = np.bincount(found["label"], minlength=21)
    assert ((count - 100) ** 2 / 100).sum() < 45.3  # chi-square of 20 degrees of freedom, p = 0.001
    assert found["image"].mean(0).std((0, 1)).max() < 4  # no place is special


def test_size_and_level_keep_the_class():
    small, large, other = (parts21_proc(np.random.default_rng(1), 60, level=level, size=size)
                           for level, size in (("grid", 32), ("grid", 64), ("std", 32)))
    for key in ("label", "part_type"):
        assert np.array_equal(small[key], large[key]) and np.array_equal(small[key], other[key])
    assert np.array_equal(2 * small["part_centre"], large["part_centre"])
    assert not np.array_equal(small["part_centre"], other["part_centre"])
    assert torch.equal(part_cells(small), part_cells(large))
    assert {k: (v.dtype.name, v.shape[1:]) for k, v in large.items()} == {
        "image": ("uint8", (64, 64, 3)), "label": ("uint8", ()), "part_type": ("uint8", (8,)),
        "part_centre": ("float32", (8, 2)), "part_visible": ("uint16", (8,))}


def test_wrong_options():
    rng = np.random.default_rng(0)
    for wrong in ({"level": "easy"}, {"size": 48}, {"size": 32.0}):
        with pytest.raises(LitvaeError, match="grid, std|32 or 64"): parts21_proc(rng, 2, **wrong)
    for grid in (0, 2.0):
        with pytest.raises(LitvaeError, match="1 or more"): part_cells(parts21_proc(rng, 2), grid=grid)


def test_the_door(tmp_path):
    few = load("parts21", "train", "standin", n=3, root=tmp_path, level="std")
    more = load("parts21", "train", "standin", n=300, root=tmp_path, level="std")
    assert all(np.array_equal(few[key], more[key][:3]) for key in few.arrays)
    assert few.describe() == "parts21_proc (std) (stand-in), train, 3 scenes of 32x32"
    easy = load("parts21", "train", "standin", n=3, root=tmp_path)
    assert easy.name == "parts21_proc (grid)" and not np.array_equal(easy["image"], few["image"])
    last = load("parts21", "train", "standin", n=300, root=tmp_path / "fresh", level="std")
    assert np.array_equal(last["image"], more["image"])
    held_out = load("parts21", "test", "standin", n=3, root=tmp_path, level="std")
    assert not np.array_equal(held_out["image"], few["image"])
    with pytest.raises(LitvaeError, match="only a stand-in"): load("parts21", source="real", root=tmp_path)
