"""The ray-caster and Objects Room: exact masks, scenes that do not depend on how they are asked for, official records
with all that can be wrong with them."""
import gzip, hashlib, math, struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.data import load, objects_room as rooms, sources, tfrecord as tf
from litvae.data.ray_caster import BOX, CYLINDER, SPHERE, camera_rays, lamp_numbers, render, silhouettes, trace

SMALL = dict(name="objects_room", source="standin", size=8)


def scene_of(seed, count=16, variant="train"):
    return rooms.room(rooms.draw_rooms(np.random.default_rng(seed), count, variant))


def arrays_on_disk(root):
    return {path.name: path.read_bytes() for path in root.rglob("*.npy") if path.parent.name != "parts"}


# ------------------------------------------------------------------------------------------------------ ray-caster
def first_inside(scene, b, n, direction, steps):
    "Distances to object n of scene b along rays (R, 3), by walking in world space and asking what is inside."
    p = scene.camera[b].double() + steps[:, None, None] * direction.double()  # (T, R, 3)
    p = p - scene.positions[b, n]
    angle, size = scene.yaws[b, n].double(), scene.sizes[b, n].double()
    x = p[..., 0] * angle.cos() + p[..., 1] * angle.sin()
    y = p[..., 1] * angle.cos() - p[..., 0] * angle.sin()
    x, y, z = x / size[0], y / size[1], p[..., 2] / size[2]
    within = {SPHERE: x * x + y * y + z * z < 1, CYLINDER: (x * x + y * y < 1) & (z.abs() < 1),
              BOX: (x.abs() < 1) & (y.abs() < 1) & (z.abs() < 1)}[scene.kinds[b, n].item()]
    return torch.where(within.any(0), steps[within.int().argmax(0)], math.inf)


def test_distances_agree_with_a_walk_along_the_rays():
    scene = scene_of(1, 5, "six_objects")
    scene.sizes = scene.sizes * torch.tensor([1.3, 0.7, 1.0])  # no two axes alike
    direction, alone = camera_rays(scene, 12), silhouettes(scene, 12).flatten(2)
    steps = torch.arange(0, 6, 0.004, dtype=torch.float64)
    for b, n in [(b, n) for b in range(5) for n in range(6)]:
        walked, cast = first_inside(scene, b, n, direction[:, b].T, steps), alone[b, n].double()
        both = (walked < math.inf) & (cast < math.inf)
        assert ((walked - cast)[both] > -1e-5).all() and ((walked - cast)[both] < 0.0041).all()
        assert (walked[cast == math.inf] == math.inf).all()  # what the cast misses, the walk misses
        assert (cast < math.inf).sum() - both.sum() <= 1  # a chord shorter than a step


@pytest.mark.parametrize("variant", ["train", "six_objects", "identical_color"])
def test_masks_are_the_nearest_silhouettes(variant):
    scene = scene_of(2, 32, variant)
    _, ids = render(scene, 32, lamp_numbers(np.random.default_rng(0), 32, 32))
    alone = silhouettes(scene, 32)
    nearest = alone.amin(1)
    for n in range(alone.shape[1]):
        seen = ids == scene.first + n
        assert torch.equal(seen, (alone[:, n] < math.inf) & (alone[:, n] == nearest))
        only = torch.zeros_like(scene.present)
        only[:, n] = scene.present[:, n]
        again = render(replace(scene, present=only), 32, torch.zeros(32, 2, 1, 32, 32), samples=1)[1]
        assert torch.equal(again >= scene.first, alone[:, n] < math.inf)  # in the room, alone
    assert torch.equal(ids >= scene.first, nearest < math.inf)


def test_rendering_does_not_depend_on_the_pieces():
    scene, jitter = scene_of(3, 6), lamp_numbers(np.random.default_rng(0), 6, 16)
    image, ids = render(scene, 16, jitter)
    for rays in (1, 2000, 2**20):
        other, same = render(scene, 16, jitter, rays=rays)
        assert torch.equal(same, ids) and (other.int() - image.int()).abs().max() <= 1
    for b in range(6):  # nor on the other scenes
        one = scene.each(lambda tensor: tensor[b:b + 1])
        assert torch.equal(render(one, 16, jitter[b:b + 1])[1][0], ids[b])


def test_objects_that_are_not_there_leave_no_trace():
    scene, jitter = scene_of(4, 8), lamp_numbers(np.random.default_rng(0), 8, 16)
    none = replace(scene, present=torch.zeros_like(scene.present))
    image, ids = render(none, 16, jitter)
    elsewhere = replace(none, positions=none.positions + 0.3, colours=1 - none.colours)
    assert torch.equal(render(elsewhere, 16, jitter)[0], image) and ids.max() < scene.first


def test_each_object_throws_a_shadow():
    scene, jitter = scene_of(5, 16), lamp_numbers(np.random.default_rng(0), 16, 32)
    image, ids = render(scene, 32, jitter)
    empty, ground = render(replace(scene, present=torch.zeros_like(scene.present)), 32, jitter)
    clear = torch.nn.functional.max_pool2d((ids >= scene.first).float(), 3, 1, 1) == 0  # no object near the pixel
    difference = (image.int() - empty.int()).sum(-1)[clear]
    assert difference.max() <= 3 and (difference < -10).float().mean() > 0.01  # darker in places, nowhere lighter


def test_the_room_is_closed_below_its_walls():
    scene = scene_of(6, 200)
    scene = replace(scene, present=torch.zeros_like(scene.present))
    direction = camera_rays(scene, 24)
    hits = trace(scene, direction)
    end = scene.camera.T[..., None] + hits.depth * direction
    sky = hits.index == 0
    assert 0 < sky.float().mean() < 0.5 and (end[:2, ~sky].abs() <= 2.602).all()
    assert (end[2, ~sky] <= 1.151).all() and (end[2, ~sky] >= -1e-4).all()
    x, y, z = scene.camera.double().T[..., None].expand(3, *sky.shape)
    out = torch.minimum(*((2.6 - start * d.sign()) / d.abs() for start, d in ((x, direction[0]), (y, direction[1]))))
    assert (z + out * direction[2])[sky].min() > 1.15 - 1e-4  # sky is seen over a wall, and only there
    assert (z + out * direction[2])[~sky].max() < 1.15 + 1e-4


@pytest.mark.parametrize("change, words", [
    (dict(size=0), "size is 0"), (dict(size=8.0), "size is 8.0"), (dict(samples=3), r"expected \(4, 2, 9, 8, 8\)"),
    (dict(view=180), "view is 180"), (dict(kinds=torch.full((4, 3), 3)), "kinds"),
    (dict(sizes=torch.zeros(4, 3, 3)), "sizes"),
])
def test_bad_scenes(change, words):
    call = dict(size=8, samples=2, jitter=lamp_numbers(np.random.default_rng(0), 4, 8))
    scene = replace(scene_of(0, 4), **{k: v for k, v in change.items() if k not in call})
    with pytest.raises(LitvaeError, match=words): render(scene, **call | {k: v for k, v in change.items() if k in call})


# -------------------------------------------------------------------------------------------------------- stand-in
def test_the_generator_is_the_one_of_its_version():
    drawn = rooms.draw_rooms(sources.shard_rng({"test": 1}, 0), 256)
    digest = hashlib.sha256(b"".join(drawn[key].astype(float).round(6).tobytes() for key in sorted(drawn))).hexdigest()
    entry = sources._REGISTRY["objects_room"]
    assert (entry.version, digest[:16]) == (1, "a161df4086ea6a84"), "other rooms: raise the version"
    made = rooms.objects_room_proc(sources.shard_rng({"test": 1}, 0), 256, size=16)
    assert abs(int((made["mask"] > 0).sum()) - 7485) <= 30  # pixels may differ at an edge


def test_rooms_do_not_depend_on_count_or_order(tmp_path):
    at_once = load(**SMALL, n=600, root=tmp_path / "a")
    load(**SMALL, n=10, root=tmp_path / "b")
    grown = load(**SMALL, n=600, root=tmp_path / "b")
    assert list(at_once.arrays) == ["image", "mask", "surface"] and at_once.name == "objects_room_proc"
    assert arrays_on_disk(tmp_path / "a") == arrays_on_disk(tmp_path / "b")
    for key in at_once.arrays: assert np.array_equal(at_once[key], grown[key])


def test_splits_seeds_and_variants_are_independent_draws(tmp_path):
    kinds = [{"split": "validation"}, {"split": "test"}, {"seed": 1}, *({"variant": v} for v in rooms.VARIANTS)]
    found = [load(**SMALL, n=64, root=tmp_path, **kind)["image"].tobytes() for kind in kinds]
    assert len(set(found)) == len(kinds)


def test_killed_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    whole = load(**SMALL, n=700, root=tmp_path / "whole")
    made = []
    def dying(*arguments, **more):
        if len(made) == 2: raise KeyboardInterrupt
        made.append(render(*arguments, **more))
        return made[-1]
    with monkeypatch.context() as patch:
        patch.setattr(rooms, "render", dying)
        with pytest.raises(KeyboardInterrupt): load(**SMALL, n=700, root=tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("meta.json"))  # it never looks finished
    made.clear()
    monkeypatch.setattr(rooms, "render", dying)  # now two shards would be one too many
    resumed = load(**SMALL, n=700, root=tmp_path / "killed")
    assert len(made) == 1 and len(resumed) == len(whole)
    assert arrays_on_disk(tmp_path / "killed") == arrays_on_disk(tmp_path / "whole")


def test_what_the_arrays_say():
    for variant, (low, high) in rooms.VARIANTS.items():
        made = rooms.objects_room_proc(np.random.default_rng(7), 64, size=16, variant=variant)
        assert all(array.dtype == np.uint8 for array in made.values()) and made["image"].shape == (64, 16, 16, 3)
        assert np.array_equal(made["mask"], np.where(made["surface"] > 3, made["surface"].astype(int) - 3, 0))
        assert made["mask"].max() == high and {0, 1, 2, 3} <= set(np.unique(made["surface"]))
    drawn = rooms.draw_rooms(np.random.default_rng(7), 64, "identical_color")
    assert (drawn["colours"] == drawn["colours"][:, :1]).all() and set(drawn["present"].sum(1)) == {4, 5, 6}


@pytest.mark.parametrize("source", ["real", "standin"])
def test_unknown_variants_and_sizes(tmp_path, source):
    write(tmp_path, "objects_room_train.tfrecords", official(1, 7))
    with pytest.raises(LitvaeError, match="known are train, empty_room"):
        load("objects_room", source=source, variant="full_room", root=tmp_path)
    for size in (0, 3.5, "64"):
        with pytest.raises(LitvaeError, match="size is"):
            load("objects_room", "test", source=source, n=1, size=size, root=tmp_path)


# ------------------------------------------------------------------------------------------------ official records
def varint(n): return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number, data): return varint(number << 3 | 2) + varint(len(data)) + data


STRINGS = [field(1, bytes([value])) for value in range(256)]


def payload_of(record):
    "A tf.train.Example with one string for each byte, after its definition."
    entries = []
    for name, array in record.items():
        strings = b"".join(STRINGS[value] for value in array.ravel().tolist())
        entries.append(field(1, field(1, name.encode()) + field(2, field(1, strings))))
    return field(1, b"".join(entries))


def write(root, name, records):
    def masked(data):
        crc = tf.crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)
    path = root / "objects_room" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", 1) as f:
        for payload in map(payload_of, records):
            length = struct.pack("<Q", len(payload))
            f.write(length + masked(length) + payload + masked(payload))
    return path


def official(count, entities, seed=0):
    "Records of noise over blocks: each entity has a rectangle of its own."
    rng = np.random.default_rng(seed)
    surface = rng.integers(entities, size=(count, 8, 8), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    images = rng.integers(256, size=(count, 64, 64, 3), dtype=np.uint8)
    return [{"image": image, "mask": 255 * (np.arange(entities)[:, None, None, None] == s[..., None]).astype(np.uint8)}
            for image, s in zip(images, surface)]


def surfaces(records): return np.stack([record["mask"].argmax(0)[..., 0] for record in records])


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD", 4)
    monkeypatch.setattr(tf, "SHARD", 4)
    monkeypatch.setattr(rooms, "RECORDS", {"test": (0, 3), "validation": (3, 8), "train": (8, None)})
    records = official(14, 7)
    return write(tmp_path, "objects_room_train.tfrecords", records), records


def real(root, split="train", **options): return load("objects_room", split, "real", root=root, **options)


def test_official_boundaries():
    assert rooms.RECORDS == {"test": (0, 10_000), "validation": (10_000, 20_000), "train": (20_000, None)}
    assert rooms.ENTITIES == {"train": 7, "empty_room": 4, "six_objects": 10, "identical_color": 10}


def test_round_trip_and_splits(train, tmp_path):
    _, records = train
    for split, (first, last) in {"test": (0, 3), "validation": (3, 8), "train": (8, 14)}.items():
        ds, part = real(tmp_path, split), records[first:last]
        assert (ds.name, ds.source, len(ds)) == ("objects_room", "real", last - first)
        assert np.array_equal(ds["image"], [record["image"] for record in part])
        assert np.array_equal(ds["surface"], surfaces(part))
        assert np.array_equal(ds["mask"], np.maximum(surfaces(part) - 3, 0))
        ids = tf.instance_ids(np.stack([record["mask"][..., 0] for record in part]), backgrounds=4)
        assert np.array_equal(ds["mask"], np.maximum(ids, 4) - 4)
    assert np.array_equal(real(tmp_path, size=16)["mask"], real(tmp_path)["mask"][:, 2::4, 2::4])
    assert np.array_equal(real(tmp_path, n=2)["image"], real(tmp_path)["image"][:2])


@pytest.mark.parametrize("variant", ["empty_room", "six_objects", "identical_color"])
def test_variants_have_files_of_their_own(tmp_path, variant):
    records = official(3, rooms.ENTITIES[variant])
    write(tmp_path, f"objects_room_test_{variant}.tfrecords", records)
    ds = real(tmp_path, "test", variant=variant)
    assert np.array_equal(ds["surface"], surfaces(records)) and ds["mask"].max() == max(0, rooms.ENTITIES[variant] - 4)
    for split in ("train", "validation"):
        with pytest.raises(LitvaeError, match=f"it has no split {split}"): real(tmp_path, split, variant=variant)
    with pytest.raises(LitvaeError, match=r"train.tfrecords \(7 GB\) is missing.*on GitHub"): real(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(LitvaeError) as caught: real(tmp_path)
    for words in (str(tmp_path / "objects_room"), "7 GB", "6 to 8 MB", "multi_object_datasets", "objects_room_proc"):
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_cut_file_is_used_up_to_the_cut(train, tmp_path):
    path, records = train
    path.write_bytes(path.read_bytes()[:-2000])
    before = path.read_bytes()
    with pytest.raises(CorruptFileError, match=r"record 13 is damaged .*get the file again") as caught: real(tmp_path)
    assert str(path) in str(caught.value) and path.read_bytes() == before
    assert np.array_equal(real(tmp_path, "test")["image"], [record["image"] for record in records[:3]])


def test_a_flipped_byte_is_found(train, tmp_path):
    path, _ = train
    data, at = bytearray(gzip.decompress(path.read_bytes())), 0
    for _ in range(10): at += 16 + struct.unpack_from("<Q", data, at)[0]
    data[at + 5000] ^= 1
    path.write_bytes(gzip.compress(bytes(data), 1))
    with pytest.raises(CorruptFileError, match="record 10 is damaged .*checksum"): real(tmp_path)
    assert len(real(tmp_path, "validation")) == 5
    assert not [p for p in tmp_path.rglob("meta.json") if p.parent.name == "train"]


@pytest.mark.parametrize("entities", [4, 6, 10])
def test_another_number_of_entities_is_refused(train, tmp_path, entities):
    _, records = train
    records[9] = official(1, entities)[0]
    write(tmp_path, "objects_room_train.tfrecords", records)
    words = r"record 9 .*mask: expected uint8 \(7, 64, 64, 1\), found"
    with pytest.raises(CorruptFileError, match=words): real(tmp_path)


def test_reading_goes_on_where_it_stopped(train, tmp_path, monkeypatch):
    _, records = train
    seen, parse = [], tf.parse_example
    def dying(payload):
        if len(seen) == 5: raise KeyboardInterrupt
        seen.append(payload)
        return parse(payload)
    with monkeypatch.context() as patch:
        patch.setattr(tf, "parse_example", dying)
        with pytest.raises(KeyboardInterrupt): real(tmp_path)
        seen.clear()
        assert np.array_equal(real(tmp_path)["surface"], surfaces(records[8:])) and len(seen) == 2  # the second shard
