"litvae segment: a run found by its name, on its own set, another set and a folder; what it refuses."
import json

import numpy as np
import pytest
from PIL import Image

from helpers.tasks import vanilla
from litvae.core.runs import find_run, run_path, train_or_load
from litvae.data import load
from litvae.genesis.decomposition import sweep
from litvae.genesis.own_images import match_labels, scenes_for
from litvae.reproduce.cli import main

SCORES = {"ari", "ari_fg", "msc", "msc_fg", "active_slots", "validation_error", "mask_kl", "component_kl"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with two finished runs: a GENESIS of four slots and a vanilla VAE, barely trained."
    root = tmp_path_factory.mktemp("runs")
    sets = {"multi_dsprites": {"data": {"source": "standin", "n": 64, "unique_colours": True}, "slots": 4, "seeds": [3],
                               "asymmetric": [4], "symmetric": []}}
    scene, = sweep(sets, size=16, mask_latent=4, std=0.3,
                   mask={"channels": 2, "features": 8, "strides": [2, 2, 1, 1, 1]},
                   asymmetric={"channels": 2, "layers": 3},
                   symmetric={}, objective={"goal_rmse": 0.1, "factor": 0.3}, steps=3, batch_size=4, learning_rate=1e-3)
    for config in (scene, vanilla("alone", steps=1)): train_or_load(config, root, progress=False)
    return root


@pytest.fixture
def pictures(tmp_path):
    "A folder of five pictures of 48x40 pixels with masks."
    drawn = load("multi_dsprites", "test", source="standin", n=5, size=48)
    for name, key in (("images", "image"), ("masks", "mask")):
        (tmp_path / "my_pictures" / name).mkdir(parents=True)
        for i, pixels in enumerate(drawn[key]):
            Image.fromarray(np.array(pixels[4:44])).save(tmp_path / "my_pictures" / name / f"{i}.png")
    return tmp_path / "my_pictures"


def segment(runs, out, *words, name="asymmetric"):
    "The exit code, and what was written to scores.json."
    code = main(["segment", "--run", name, "--runs", str(runs), "--out", str(out), *map(str, words)])
    return code, json.loads((out / "scores.json").read_text()) if (out / "scores.json").exists() else None


def test_on_its_own_set_a_run_scores_what_it_scored_when_it_was_trained(runs, tmp_path):
    code, written = segment(runs, tmp_path, "--data", "multi_dsprites")
    recorded = find_run("asymmetric", runs).result["metrics"]
    assert code == 0 and written["scenes"] == 300 and written["slots"] == 4 and set(written["scores"]) == SCORES
    for name, value in written["scores"].items(): assert value == pytest.approx(recorded[name], abs=1e-6), name
    assert Image.open(tmp_path / "segmentation.png").width > 300
    origin = json.loads((tmp_path / "segmentation.json").read_text())["provenance"]
    assert origin["runs"] == [written["run"]]


def test_other_sets_and_other_slots(runs, tmp_path, capsys):
    code, written = segment(runs, tmp_path, "--data", "objects_room", "--slots", 6, "--n", 12)
    assert code == 0 and (written["data"], written["source"]) == ("objects_room_proc", "standin")
    assert (written["split"], written["scenes"], written["slots"]) == ("validation", 12, 6)
    assert "objects_room_proc (stand-in), validation, 12 scenes of 16x16, K = 6" in capsys.readouterr().out


def test_a_folder_with_masks_is_scored_and_one_without_is_drawn(runs, pictures, tmp_path, capsys):
    code, written = segment(runs, tmp_path / "with", "--data", pictures, "--slots", 7)
    assert code == 0 and written["data"] == "my_pictures" and written["scenes"] == 5
    assert set(written["scores"]) == SCORES
    (pictures / "masks").rename(tmp_path / "aside")
    code, written = segment(runs, tmp_path / "without", "--data", pictures)
    assert code == 0 and written["scores"] is None and "no masks" in capsys.readouterr().out
    assert (tmp_path / "without" / "segmentation.png").exists()


@pytest.mark.parametrize("words, text", [
    (["--run", "latent4-seed9", "--data", "multi_dsprites"], "no run 'latent4-seed9' is finished"),
    (["--run", "seed", "--data", "nowhere"], "unknown data 'nowhere': neither a folder nor one of cifar10"),
    (["--run", "l", "--data", "multi_dsprites"], "no run is meant by 'l' alone"),
    (["--run", "alone", "--data", "multi_dsprites"], "has no slots"),
    (["--run", "asymmetric", "--data", "multi_dsprites", "--slots", "1"], "was trained with 4 slots and cannot use 1")])
def test_bad_arguments_give_one_line_and_exit_code_2(runs, tmp_path, capsys, words, text):
    assert main(["segment", "--runs", str(runs), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--slots", "--n"])
@pytest.mark.parametrize("value", ["0", "-2", "2.5", "many"])
def test_numbers_that_count_nothing_are_refused(option, value, capsys):
    assert main(["segment", "--run", "x", "--data", "multi_dsprites", option, value]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_user_can_mend_is_exit_code_1(runs, pictures, tmp_path, capsys):
    (pictures / "masks" / "3.png").unlink()
    assert segment(runs, tmp_path / "out", "--data", pictures)[0] == 1
    weights = run_path(find_run("asymmetric", runs).config, runs) / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    try: assert segment(runs, tmp_path / "out", "--data", "multi_dsprites")[0] == 1
    finally: weights.write_bytes(whole)
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "3.png is missing" in error and "weights.safetensors is damaged" in error


def test_a_named_set_comes_before_a_folder_of_that_name(runs, tmp_path, monkeypatch):
    (tmp_path / "multi_dsprites").mkdir()
    monkeypatch.chdir(tmp_path)
    scenes = scenes_for(find_run("asymmetric", runs), "multi_dsprites", 3)
    assert scenes.name == "multi_dsprites_proc" and len(scenes) == 3


def test_matching_gives_every_permutation_of_the_truth_back():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, size=(20, 9, 7))
    renamed = np.stack([rng.permutation(6)[image] for image in true])
    assert np.array_equal(match_labels(true, renamed), true)
    assert np.unique(match_labels(np.zeros((1, 2, 2), int), np.array([[[0, 1], [1, 1]]]))).tolist() == [0, 1]
    ignored = match_labels(np.full((1, 2, 2), -1), np.array([[[0, 1], [1, 1]]]))
    assert ignored.shape == (1, 2, 2) and len(np.unique(ignored)) == 2
