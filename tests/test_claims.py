"The judge: it agrees with scipy, is hard to please with few seeds, and says in words what is wrong with its input."
import copy, csv, errno, json, os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats

from litvae.core import claims as c
from litvae.core.files import CorruptFileError, LitvaeError
from litvae.reproduce.report import judge_paper, write_report

NEEDS = {"seeds": 3, "preset": "small", "data": "any"}


def claim(kind, judge, paper=None, needs=None, metric="error"):
    paper = {str(k): v if isinstance(v, c.Printed) else c.Printed(v) for k, v in (paper or {}).items()}
    return c.Claim("a-claim", "A sentence.", "Table 1", kind, metric, paper, NEEDS | (needs or {}), judge)


ORDERING = claim("ordering", {"lower": "A", "higher": "B"})
FALLS, RISES = (claim("trend", {"direction": d}) for d in ("falls", "rises"))
FLAT = claim("trend", {"direction": "flat", "after": 4, "margin": 0.1, "better": "lower"})


def status(claim, observation, preset="small", source="standin"):
    return c.judge(claim, observation, preset, source).status


def trend(table, x=None): return {"x": x or [2 ** i for i in range(len(table))], "values": table}


# --- claims.yaml -----------------------------------------------------------------------------------------------------

GOOD = {"id": "a", "sentence": "It falls.", "where": "Table 1", "kind": "trend", "metric": "error",
        "paper": {1: 0.5, 2: None}, "needs": NEEDS, "judge": {"direction": "falls"}}


def written(tmp_path, entries):
    path = tmp_path / "claims.yaml"
    path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
    return path


def changed(**changes):
    "GOOD with other values; `needs__seeds` means the key `seeds` inside `needs`."
    entry = copy.deepcopy(GOOD)
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner: entry[outer][inner] = value
        else: entry[outer] = value
    return entry


def test_a_good_file_is_read_in_full(tmp_path):
    one, = c.load_claims(written(tmp_path, [changed(sentence="It\n  falls.")]))
    assert one.paper == {"1": c.Printed(0.5), "2": c.Printed(None)} and one.sentence == "It falls."
    odd = {"1": {"value": 0.5, "spread": 0.1, "misprint": True, "note": "digits swapped"}}
    one, = c.load_claims(written(tmp_path, [changed(paper=odd)]))
    assert one.paper["1"] == c.Printed(0.5, 0.1, True, "digits swapped")


@pytest.mark.parametrize("entry, words", [
    (changed(kind="trends"), ["'a'", "kind is 'trends'", "ordering"]), (changed(metric=""), ["'a'", "metric is ''"]),
    (changed(needs__seeds=0), ["'a', needs", "seeds is 0"]), (changed(needs__seeds=True), ["seeds is True"]),
    (changed(needs__seeds="3"), ["seeds is '3'", "whole number"]), (changed(needs__gpu=1), ["unknown key 'gpu'"]),
    (changed(needs__data="fake"), ["'a', needs", "data is 'fake'", "real or any"]),
    (changed(needs__preset="Small"), ["'a', needs", "preset is 'Small'"]), (changed(needs=None), ["needs is None"]),
    (changed(judge={}), ["'a', judge", "direction"]), (changed(judge__margin=0.1), ["unknown key 'margin'"]),
    (changed(judge__direction="down"), ["direction is 'down'", "falls"]),
    (changed(judge={"direction": "flat", "after": 4, "margin": 0.1}), ["key 'better' is missing"]),
    (changed(judge={"direction": "flat", "after": "4", "margin": 0.1, "better": "lower"}), ["after is '4'"]),
    (changed(kind="ordering"), ["'a', judge", "unknown key 'direction'"]),
    (changed(kind="ordering", judge={"lower": "A", "higher": "A"}), ["both 'A'"]),
    (changed(kind="value", judge={"tolerance": 0.1}, paper={}), ["'a', paper", "printed numbers"]),
    (changed(paper={1: "0.5"}), ["'a', paper.1 is '0.5'"]), (changed(paper=[0.5]), ["paper is [0.5]"]),
    (changed(paper={1: {"value": 0.5, "sd": 1}}), ["unknown key 'sd'"]),
    (changed(paper={1: {"spread": 0.5}}), ["'a', paper.1"]),
    (changed(paper={1: float("nan")}), ["paper.1 is nan"]), (changed(id="../x"), ["'../x'", "hyphens"]),
    (changed(id=3), ["claim 3", "id is 3"]), ("just words", ["claims.yaml", "claim number 1", "just words"]),
    ({k: v for k, v in GOOD.items() if k != "id"}, ["claim number 1", "'id' is missing"])])
def test_every_mistake_names_file_claim_and_key(tmp_path, entry, words):
    path = written(tmp_path, [entry])
    with pytest.raises(LitvaeError) as error: c.load_claims(path)
    for word in [str(path), *words]: assert word in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("- id: [", "not valid YAML"), ("", "expected a YAML list"), ("a: 1", "expected a YAML list"),
    ("[]", "expected a YAML list"), ("- {id: a, id: b}", "'id' stands twice"),
    ("- !!python/object/apply:os.getcwd []", "not valid YAML")])
def test_files_that_are_not_lists_of_claims(tmp_path, text, words):
    with pytest.raises(LitvaeError, match=words): c.load_claims(written(tmp_path, text))


def test_missing_file_and_double_ids(tmp_path):
    with pytest.raises(LitvaeError, match="does not exist"): c.load_claims(tmp_path / "claims.yaml")
    with pytest.raises(LitvaeError, match="'a': the id stands twice"): c.load_claims(written(tmp_path, [GOOD, GOOD]))


# --- ordering and trend against scipy --------------------------------------------------------------------------------

@pytest.mark.parametrize("case", range(40))
def test_ordering_is_the_paired_t_test(case):
    rng = np.random.default_rng(case)
    n = rng.integers(3, 8)
    shared = rng.normal(0, 5, n)  # what both conditions have in common must not matter
    low, high = shared + rng.normal(0, 1, n), shared + rng.normal(rng.choice([-2, 0, 2]), 1, n)
    test = stats.ttest_rel(high, low)
    expected = "inconclusive" if test.pvalue > 0.05 else "holds" if test.statistic > 0 else "fails"
    assert status(ORDERING, {"lower": list(low), "higher": list(high)}) == expected


@pytest.mark.parametrize("case", range(25))
def test_slope_is_least_squares_per_seed_and_a_t_test(case):
    rng = np.random.default_rng(case)
    n, x = rng.integers(3, 6), np.array([1, 2, 4, 8, 16])
    table = rng.choice([-.5, 0, .5]) * np.log2(x)[:, None] + rng.normal(0, 0.3, (5, n)) + rng.normal(0, 5, n)
    slopes = [stats.linregress(np.log2(x), column).slope for column in table.T]
    steps = [stats.ttest_1samp(step, 0) for step in np.diff(table, axis=0)]
    broken = any(s.pvalue < 0.05 / 4 and s.statistic > 0 for s in steps)
    test, falling = stats.ttest_1samp(slopes, 0), all(s.statistic < 0 for s in steps)
    expected = "inconclusive" if test.pvalue > 0.05 else "holds" if test.statistic < 0 else "fails"
    if broken: expected = "fails"
    elif expected == "holds" and not falling: expected = "inconclusive"
    assert status(FALLS, trend(table.tolist(), x.tolist())) == expected
    assert status(RISES, trend((-table).tolist(), x.tolist())) == expected


def test_linear_scale_is_the_slope_per_unit():
    linear = claim("trend", {"direction": "rises", "scale": "linear"})
    verdict = c.judge(linear, trend([[0, 0.1, 0], [10, 10.1, 10]], [0, 5]), "small", "real")
    assert verdict.status == "holds" and "2 per unit from 0 to 5" in verdict.reason
    with pytest.raises(LitvaeError, match="scale: linear"): status(RISES, trend([[1, 2, 3], [1, 2, 3]], [0, 5]))


def test_a_trend_that_turns_at_the_end_does_not_hold():
    for last, expected in ((1.3, "fails"), (1.01, "inconclusive"), (0.9, "holds")):
        rows = [[v + e for e in (-.01, 0, .012)] for v in (5, 4, 3, 2, 1)] + [[last + e for e in (.01, 0, -.013)]]
        verdict = c.judge(FALLS, trend(rows), "small", "real")
        assert verdict.status == expected
        assert ("16 to 32 does not go that way" in verdict.reason) == (expected != "holds")


def test_equal_values_decide_nothing():
    constant = [[0.1, 0.2, 0.7]] * 6
    assert {status(claim, trend(constant)) for claim in (FALLS, RISES, FLAT)} == {"inconclusive"}
    assert status(ORDERING, {"lower": constant[0], "higher": constant[0]}) == "inconclusive"


def test_a_margin_must_be_exceeded():
    wide = claim("ordering", {"lower": "A", "higher": "B", "margin": 1.0})
    for shift, expected in ((1.5, "holds"), (1.0, "inconclusive"), (0.5, "fails"), (-3, "fails")):
        low = np.array([0.0, 0.1, 0.2])
        assert status(wide, {"lower": list(low), "higher": list(low + shift + [-.1, 0, .1])}) == expected


# --- "stops improving" is not obtained by noise ----------------------------------------------------------------------

def curves(rng, further, noise, seeds=3):
    means = np.array([2, 1.5, 1, 1 - further, 1 - further])
    return (means[:, None] + rng.normal(0, noise, (5, seeds))).tolist()


def test_noise_alone_never_earns_a_plateau():
    rng = np.random.default_rng(0)
    noises = np.repeat([0.03, 0.1, 0.5, 2.0], 150)  # the further gain is exactly what is allowed
    answers = [status(FLAT, trend(curves(rng, further=0.1, noise=noise))) for noise in noises]
    assert np.mean([a == "holds" for a in answers]) < 0.03


def test_a_real_plateau_is_found_and_a_real_gain_refuted():
    rng = np.random.default_rng(1)
    assert np.mean([status(FLAT, trend(curves(rng, 0.0, 0.01))) == "holds" for _ in range(60)]) > 0.9
    assert np.mean([status(FLAT, trend(curves(rng, 0.4, 0.01))) == "fails" for _ in range(60)]) > 0.9


def test_plateau_follows_the_direction_of_better():
    higher = claim("trend", {"direction": "flat", "after": 4, "margin": 0.1, "better": "higher"})
    table = np.array([[1, 2, 3, 3, 3], [1.1, 2, 3.01, 3, 3.02], [.9, 2, 2.99, 3, 2.98]]).T
    assert status(higher, trend(table.tolist())) == status(FLAT, trend((-table).tolist())) == "holds"
    assert status(FLAT, trend(table.tolist())) == "inconclusive"  # it only got worse: nothing that could stop
    for x in ([4, 8, 16, 32, 64], [1, 2, 3, 5, 6], [1, 1.5, 2, 3, 4]):
        with pytest.raises(LitvaeError, match="needs 4"): status(FLAT, trend(table.tolist(), x))


# --- thresholds and steps to a goal ----------------------------------------------------------------------------------

NEVER = claim("threshold", {"sense": "above", "strict": True}, metric="goal_step")
OFTEN = claim("threshold", {"sense": "above"}, metric="goal_step")
REACHES = claim("threshold", {"sense": "below"}, metric="goal_step")


@pytest.mark.parametrize("judged, values, expected", [
    (NEVER, {"a": [None] * 3, "b": [None] * 3}, "holds"), (NEVER, {"a": [None] * 3, "b": [None, None, 100]}, "fails"),
    (OFTEN, {"a": [None] * 3, "b": [None, None, 100]}, "inconclusive"),
    (OFTEN, {"a": [None] * 3, "b": [1, 2, 100]}, "fails"), (REACHES, {"a": [1, 50, 100]}, "holds"),
    (REACHES, {"a": [1, 50, None]}, "inconclusive"), (REACHES, {"a": [1, 2, 3], "b": [None] * 3}, "fails"),
    (NEVER, {"a": [None] * 2}, "inconclusive"), (REACHES, {"a": [1, 2, 3], "b": []}, "inconclusive")])
def test_steps_to_a_goal_are_counted(judged, values, expected):
    assert status(judged, {"values": values, "budget": 100}) == expected


def test_a_bound_below_the_budget():
    assert status(REACHES, {"values": {"a": [1, 2, 60]}, "budget": 100, "bound": 50}) == "inconclusive"
    assert status(REACHES, {"values": {"a": [70, None, 60]}, "budget": 100, "bound": 50}) == "fails"
    with pytest.raises(LitvaeError, match="beyond the budget"):
        status(REACHES, {"values": {"a": [1] * 3}, "budget": 100, "bound": 500})
    with pytest.raises(LitvaeError, match="gives a bound"): status(REACHES, {"values": {"a": [1.0] * 3}})
    for code in (-1, 101):
        with pytest.raises(LitvaeError, match="None says"):
            status(REACHES, {"values": {"a": [code, 2, 3]}, "budget": 100})


def test_runs_that_never_arrive_count_with_the_budget_in_trends_and_orderings():
    later = {"lower": [10, 20, 30], "higher": [None, None, None]}
    assert status(ORDERING, later | {"budget": 100}) == "holds" and status(ORDERING, later) == "inconclusive"
    sooner = {"x": [32, 64, 128], "values": [[None, None, 95], [50, 55, 52], [20, 21, 22]], "budget": 100}
    assert status(FALLS, sooner) == "holds"
    assert status(FALLS, sooner | {"values": sooner["values"][::-1]}) == "fails"


def test_thresholds_on_errors_use_the_interval():
    above = claim("threshold", {"sense": "above", "bound": 0.5})
    for values, expected in (([.60, .61, .62], "holds"), ([.49, .55, .61], "inconclusive"),
                             ([.51, .6, .9], "inconclusive"), ([.3, .31, .3], "fails")):
        assert status(above, {"values": {"a": [.7, .71, .72], "b": values}}) == expected
    one = claim("threshold", {"sense": "below", "bound": 0.5}, needs={"seeds": 1})
    assert status(one, {"values": {"a": {7: 0.4}}}) == "holds" and status(one, {"values": {"a": {7: 0.6}}}) == "fails"


# --- printed values --------------------------------------------------------------------------------------------------

def test_values_misprints_and_dashes():
    paper = {"16": 0.57, "32": c.Printed(0.9, misprint=True, note="sic"), "64": None}
    value = claim("value", {"tolerance": 0.001}, paper, {"seeds": 1})
    assert status(value, {"values": {16: [0.5705]}}) == "holds"
    verdict = c.judge(value, {"values": {16: [0.5705], "32": [0.1]}}, "small", "real")
    assert verdict.status == "holds" and "~~0.9000~~ (misprint: sic)" in verdict.paper
    assert status(value, {"values": {16: [0.5712]}}) == "fails"
    assert status(value, {"values": {16: [0.569, 0.5715]}}) == "inconclusive"
    assert "not measured: 16" in c.judge(value, {"values": {"64": [1.0]}}, "small", "real").reason
    only = claim("value", {"tolerance": 1}, {"32": c.Printed(0.9, misprint=True)}, {"seeds": 1})
    verdict = c.judge(only, {"values": {"32": [0.9]}}, "small", "real")
    assert verdict.status == "inconclusive" and "misprint" in verdict.reason
    with pytest.raises(LitvaeError, match="unknown condition '17'"): status(value, {"values": {"17": [0.57]}})


def test_relative_tolerance_and_steps_that_were_never_reached():
    steps = claim("value", {"tolerance": 0.25, "relative": True}, {"32": 8000}, {"seeds": 1}, "goal_step")
    for got, expected in ((9999, "holds"), (10001, "fails"), (6001, "holds"), (None, "fails")):
        assert status(steps, {"values": {"32": [got]}, "budget": 500000}) == expected


# --- the judge -------------------------------------------------------------------------------------------------------

GAP = {"lower": {0: 1.0, 1: 1.1, 2: 0.9}, "higher": {0: 2.0, 1: 2.2, 2: 1.9}}


@pytest.mark.parametrize("preset, enough", [("smoke", False), ("quick", False), ("small", True), ("paper", True)])
def test_presets_are_ordered(preset, enough):
    verdict = c.judge(ORDERING, GAP, preset, "standin")
    assert verdict.status == ("holds" if enough else "inconclusive")
    assert ("below small; so far error of B" in verdict.reason) != enough


def test_three_seeds_are_the_least_and_more_may_be_asked():
    less = {side: {s: v for s, v in values.items() if s < 2} for side, values in GAP.items()}
    lenient, greedy = (claim("ordering", ORDERING.judge, needs={"seeds": n}) for n in (1, 5))
    assert "2 of 3 seeds" in c.judge(lenient, less, "small", "real").reason and status(lenient, GAP) == "holds"
    assert "3 of 5 seeds; so far" in c.judge(greedy, GAP, "small", "real").reason
    single = c.judge(ORDERING, {"lower": [1.0], "higher": [2.0]}, "quick", "real")
    assert single.status == "inconclusive" and "nan" not in single.reason + single.ours
    assert single.reason.startswith("1 of 3 seeds, preset quick is below small; so far")


def test_only_seeds_measured_everywhere_are_paired():
    extra = {"lower": GAP["lower"] | {3: 99.0}, "higher": GAP["higher"] | {4: -99.0}}
    verdict = c.judge(ORDERING, extra, "small", "real")
    assert verdict.status == "holds" and verdict.seeds == tuple("01234")
    assert "only the 3 seeds measured everywhere count" in verdict.reason
    apart = c.judge(ORDERING, {"lower": {0: 1.0}, "higher": {1: 2.0}}, "small", "real")
    assert apart.reason == "no seed was measured everywhere"


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("nan"))])
@pytest.mark.parametrize("judged, observation", [
    (ORDERING, lambda v: {"lower": GAP["lower"], "higher": GAP["higher"] | {1: v}}),
    (FALLS, lambda v: trend([[3, 3, 3], [2, v, 2]])),
    (claim("threshold", {"sense": "below", "bound": 1}), lambda v: {"values": {"a": [0, v, 0]}}),
    (claim("value", {"tolerance": 1}, {"a": 0}), lambda v: {"values": {"a": [0, v, 0]}})])
def test_a_run_without_a_value_is_named_and_leaves_the_claim_open(bad, judged, observation):
    verdict = c.judge(judged, observation(bad), "small", "real")
    assert verdict.status == "inconclusive" and "seed 1: the run diverged" in verdict.reason
    assert "2 of 3 with a value" in verdict.ours


def test_real_data_or_nothing():
    real = claim("value", {"tolerance": 0.1}, {"a": 1.0}, {"data": "real", "seeds": 1})
    seen = {"values": {"a": [1.0]}}
    assert status(real, seen, source="standin") == status(real, None, source="standin") == "needs real data"
    assert status(real, None, source="real") == status(real, None, None, None) == status(ORDERING, None) == "not run"
    assert status(real, seen, source="real") == "holds"
    for arguments in ((seen, None, "real"), (seen, "small", None), (seen, "huge", "real"), (seen, "small", "fake"),
                      (None, "huge", None)):
        with pytest.raises(LitvaeError): c.judge(real, *arguments)


@pytest.mark.parametrize("judged, observation", [
    (ORDERING, {"lower": GAP["lower"]}), (ORDERING, GAP | {"middle": [1]}), (ORDERING, [1, 2]),
    (ORDERING, {"lower": 1.0, "higher": 2.0}), (ORDERING, {"lower": ["1"], "higher": [2]}),
    (ORDERING, {"lower": [True], "higher": [2]}), (ORDERING, GAP | {"bound": 1}),
    (FALLS, {"x": [1, 2], "values": [[1]]}), (FALLS, {"x": [2, 1], "values": [[1], [2]]}),
    (FALLS, {"x": [1, 1], "values": [[1], [2]]}), (FALLS, {"x": [1], "values": [[1]]}),
    (FALLS, {"x": ["a", "b"], "values": [[1], [2]]}), (FALLS, {"x": 3, "values": 4}),
    (REACHES, {"values": {}}), (REACHES, {"values": [1, 2]}), (REACHES, {"values": {"a": 3}}),
    (REACHES, {"values": {"a": [1]}, "budget": "9"})])
def test_other_forms_are_refused_with_the_claims_name(judged, observation):
    with pytest.raises(LitvaeError, match="'a-claim'"): c.judge(judged, observation, "small", "real")


# --- records ---------------------------------------------------------------------------------------------------------

def test_verdicts_survive_the_file(tmp_path):
    single = {np.int64(seed): np.float32(value) for seed, value in GAP["lower"].items()}
    for judged, seen in [(ORDERING, {"lower": single, "higher": torch.tensor([2., 2.2, 1.9])}),
                         (FALLS, trend(np.array([[3, 3.1, 2.9], [2, 2.2, 2.1]]))),
                         (REACHES, {"values": {8: [3, float("nan"), None]}, "budget": 9})]:
        c.record(tmp_path, judged.id, seen, {"preset": "small"})
        back = c.read_observations(tmp_path)[judged.id]
        assert c.judge(judged, back["observation"], "small", "real") == c.judge(judged, seen, "small", "real")


def test_conditions_keep_the_papers_order(tmp_path):
    value = claim("value", {"tolerance": 1}, {1: 1, 2: 1, 16: 1, 128: None}, {"seeds": 1})
    c.record(tmp_path, "a", {"values": {x: [1.0] for x in (128, 16, 2, 1)}}, {})
    seen = c.read_observations(tmp_path)["a"]["observation"]
    assert c.judge(value, seen, "small", "real").ours == "1: 1 · 2: 1 · 16: 1 · 128: 1"


def test_a_full_disk_keeps_the_old_record(tmp_path, monkeypatch):
    path = c.record(tmp_path, "a", GAP, {})
    old = path.read_bytes()
    def full(*_): raise OSError(errno.ENOSPC, "")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LitvaeError, match="disk is full"): c.record(tmp_path, "a", {}, {})
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"claim": "b", "observation": {}, "provenance": {}}',
                                  '{"claim": "a", "observation": {}}'])
def test_damaged_records_are_named_and_kept(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CorruptFileError, match="a.json"): c.read_observations(tmp_path)
    assert (tmp_path / "a.json").read_text() == text


# --- the claims about Tables 1 and 2 ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tables(root):
    "{(kind, data): {latent: (goal step or None, error or None)}}: the repository's other transcription of the tables."
    found = {}
    with open(root / "reproduce" / "reconstruction_bottlenecks" / "published_tables_1_2.csv") as f:
        for row in csv.DictReader(f):
            cell = tuple(float(row[key]) if row[key] else None for key in ("goal_step", "error"))
            found.setdefault((row["kind"], row["data"]), {})[int(row["latent"])] = cell
    return found


@pytest.fixture(scope="module")
def paper_claims(root):
    return {one.id: one for one in c.load_claims(root / "reproduce" / "reconstruction_bottlenecks" / "claims.yaml")}


def observations(sbd, dc, data):
    "What the paper's own numbers would be as three seeds that differ by little."
    wiggle = np.array([-1e-5, 0, 1e-5])
    error = lambda table, x: list((table[x][1] or 0.5655) + wiggle * (-1) ** np.log2(x))
    step = lambda table, x: [None] * 3 if table[x][0] is None else list(table[x][0] * (1 + wiggle))
    sizes, large = sorted(sbd), [32, 64, 128, 256]
    steps = lambda table, xs: {"values": {x: step(table, x) for x in xs}, "budget": 500000}
    curve = lambda table, xs: {"x": list(xs), "values": [error(table, x) for x in xs]}
    mean = lambda table: list(np.mean([error(table, x) for x in large], 0))
    up_to_goal = [x for x in sizes if dc[x][0] is None]
    up_to_goal += [x for x in sizes if x not in up_to_goal][:1]  # beyond it GECO holds the error at the goal
    found = {"sbd-never-reaches-goal": steps(sbd, sizes), "sbd-stops-improving-at-32": curve(sbd, sizes),
             "sbd-error-falls-to-32": curve(sbd, sizes[:6]), "dc-error-falls": curve(dc, up_to_goal),
             "dc-reaches-goal": steps(dc, large), "dc-small-misses-goal": steps(dc, sizes[:4]),
             "dc-larger-is-sooner": {"x": large, "values": [step(dc, x) for x in large], "budget": 500000},
             "dc-small-far-from-goal": {"values": {x: error(dc, x) for x in sizes[:4]}},
             "dc-below-sbd": {"lower": mean(dc), "higher": mean(sbd)}}
    for name, table in (("table1", sbd), ("table2", dc)):
        found[f"{name}-error-{data}"] = {"values": {x: error(table, x) for x in sizes}}
    return found | {f"table2-steps-{data}": steps(dc, sizes)}


@pytest.mark.parametrize("data", ["multi_dsprites", "shapestacks", "objects_room"])
def test_the_papers_own_numbers_carry_every_claim(tables, paper_claims, data):
    seen = observations(tables["sbd", data], tables["dc", data], data.replace("_", "-"))
    assert set(seen) <= set(paper_claims)
    verdicts = {name: c.judge(paper_claims[name], observation, "paper", "real") for name, observation in seen.items()}
    assert {name: v.reason for name, v in verdicts.items() if v.status != "holds"} == {}


def test_the_two_architectures_exchanged_do_not_carry_them(tables, paper_claims):
    seen = observations(tables["dc", "multi_dsprites"], tables["sbd", "multi_dsprites"], "multi-dsprites")
    for name in ("sbd-never-reaches-goal", "dc-reaches-goal", "dc-below-sbd", "table1-error-multi-dsprites",
                 "table2-error-multi-dsprites", "table2-steps-multi-dsprites"):
        assert status(paper_claims[name], seen[name], "paper", "real") == "fails"
    flat = paper_claims["sbd-stops-improving-at-32"]
    assert status(flat, trend([[0.6 - 0.003 * i + e for e in (-1e-4, 0, 1e-4)] for i in range(9)])) == "fails"


def test_claims_and_transcription_agree_on_every_printed_number(tables, paper_claims):
    seen = 0
    for (kind, data), cells in tables.items():
        for latent, (step, error) in cells.items():
            name = f"table{1 + (kind == 'dc')}-{'steps' if error is None else 'error'}-{data.replace('_', '-')}"
            assert paper_claims[name].paper[str(latent)].value == (step if error is None else error)
            seen += 1
    targets = [p for name, one in paper_claims.items() if name.startswith("table") for p in one.paper.values()]
    assert seen == sum(p.value is not None for p in targets) == 54


# --- what the pages feed to the claims about Figures 2 to 7 ----------------------------------------------------------

def cells(root, page, ids, **names):
    "The definitions in some cells of a page, with `names` in the place of its runs."
    notebook = json.loads((root / "reproduce" / "reconstruction_bottlenecks" / page).read_text())
    sources = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    space = {"np": np, "pd": pd, **names}
    for one in ids: exec(compile(sources[one], f"{page}#{one}", "exec"), space)
    return space


def invented(components, seeds=3, std=0.3, data="multi_dsprites"):
    "Results as in the paper: the asymmetric model decomposes, the symmetric one up to 8; both suffer with size 1."
    rng, rows = np.random.default_rng(0), []
    for component, latents in components.items():
        for latent in latents:
            for seed in range(seeds):
                found = 0 if component == "symmetric" and latent > 8 else 0.6 if latent == 1 else 0.9
                unrest = 0.001 if component == "asymmetric" else 0.005
                rmse = 0.1 + 0.05 * (latent == 1) + unrest * rng.choice([-1, 1])
                rows.append({"data": data, "component": component, "latent": latent, "seed": seed, "rmse": rmse,
                             "msc_fg": 0.05 + 0.45 * found + rng.normal(0, 0.005), "ari": 0.9 * found,
                             "active_slots": 3.4 if found else 1.0, "validation_error": rmse ** 2 / 2 / std ** 2})
    return pd.DataFrame(rows)


ENDS = {"one component": {"msc_fg": 0.05, "ari": 0.0}, "foreground/background": {"msc_fg": 0.5, "ari": 0.98}}
MEASURE = ["measure", "orderings", "measure-more", "measure-sides", "measure-pairs", "measure-common", "far",
           "observations", "observe-more"]


def dc_runs(tables, data, column):
    "The paper's column of Table 2 as one run a size."
    return [SimpleNamespace(config=SimpleNamespace(data={"name": data}, model={"latent": latent}),
                            result={"metrics": {"error_ema": error or 0.5655}})
            for latent, (_, error) in tables["dc", column].items()]


def observed(root, results, tables, data="multi_dsprites", column=None):
    page = cells(root, "contrast.ipynb", MEASURE, results=results, baselines={data: ENDS},
                 single=dc_runs(tables, data, column or data), goal_of=lambda run, std: 0.5655)
    return page["observe"](data) | page["observe_more"](data)


FULL = {"asymmetric": [1, 4, 16, 64, 256], "symmetric": [1, 2, 4, 8, 16, 64]}


def test_results_like_the_papers_carry_every_claim_about_the_figures(root, tables, paper_claims):
    seen = observed(root, invented(FULL), tables)
    others = ("shapestacks", "objects-room")
    figures = {name for name, one in paper_claims.items() if not one.paper and not name.endswith(others)}
    assert set(seen) == figures and all(seen.values())
    verdicts = {name: c.judge(paper_claims[name], one, "small", "standin") for name, one in seen.items()}
    assert {name: v.reason for name, v in verdicts.items() if v.status != "holds"} == {}


def test_exchanged_architectures_do_not_carry_the_claims_about_the_figures(root, tables, paper_claims):
    results = invented({"asymmetric": FULL["symmetric"], "symmetric": FULL["symmetric"]})
    results["component"] = results.component.map({"asymmetric": "symmetric", "symmetric": "asymmetric"})
    seen = observed(root, results, tables)
    for name in ("asymmetric-decomposes", "asymmetric-decomposes-ari", "symmetric-collapses",
                 "asymmetric-above-symmetric"):
        assert status(paper_claims[name], seen[name]) == "fails", name
    assert status(paper_claims["symmetric-error-less-stable"], seen["symmetric-error-less-stable"]) != "holds"


@pytest.mark.parametrize("asymmetric", [[], [64], [4, 16], [1, 4, 64]])
@pytest.mark.parametrize("symmetric", [[], [64], [4, 64], [1, 16]])
def test_a_sweep_that_lacks_sizes_gives_no_errors_and_no_holds_with_one_seed(root, tables, paper_claims, asymmetric,
                                                                             symmetric):
    results = invented({"asymmetric": asymmetric, "symmetric": symmetric, "other": [1]}, seeds=1)
    for name, seen in observed(root, results, tables).items():
        verdict = c.judge(paper_claims[name], seen, "small", "standin")
        assert verdict.status in ("not run", "inconclusive"), (name, verdict)


@pytest.mark.parametrize("data", ["multi_dsprites", "shapestacks", "objects_room"])
def test_far_from_the_goal_is_the_interval_that_the_paper_names(root, tables, data):
    results = invented(FULL)
    results["msc_fg"] = 1.0 * results.latent.between(1, 8)
    assert observed(root, results, tables, column=data)["decomposition-where-dc-is-far"] == {
        "lower": {0: 0.0, 1: 0.0, 2: 0.0}, "higher": {0: 1.0, 1: 1.0, 2: 1.0}}


@pytest.mark.parametrize("latents", [[64], [1, 64], [1, 4, 16, 64, 256], [1, 2, 4, 8, 16, 32, 64, 128, 256]])
def test_the_pages_of_the_tables_cope_with_any_sizes(root, paper_claims, latents):
    rows = [{"data": "multi_dsprites", "kind": kind, "latent": latent, "seed": seed, "error_ema": 0.6 - 0.001 * latent,
             "goal_step": 100 if kind == "dc" and latent > 8 else -1}
            for kind in ("sbd", "dc") for latent in latents for seed in range(2)]
    page = cells(root, "vanilla_error.ipynb", ["observe", "observe-more", "record"], results=pd.DataFrame(rows),
                 steps={"multi_dsprites": 500}, paper=None, project_root=lambda: root,
                 load_claims=lambda path: paper_claims.values())
    for name, seen in page["observations"]["multi_dsprites"].items():
        assert status(paper_claims[name], seen or None, "quick") in ("not run", "inconclusive"), name


# --- the report ------------------------------------------------------------------------------------------------------

@pytest.fixture
def project(tmp_path):
    for name in ("beta", "alpha"):
        written_to = tmp_path / "reproduce" / name
        written_to.mkdir(parents=True)
        real = GOOD | {"id": "b", "kind": "value", "judge": {"tolerance": 0.1}, "paper": {1: 0.5}, "sentence": "a | b",
                       "needs": {"seeds": 1, "preset": "paper", "data": "real"}}
        (written_to / "claims.yaml").write_text(yaml.safe_dump([GOOD, real]))
    (tmp_path / "reproduce" / "alpha" / "pages.yaml").write_text("title: Alpha's title\n")
    (tmp_path / "reproduce" / "presets").mkdir()
    return tmp_path


def origin(preset, *sources):
    return {"preset": preset, "data": [{"name": s, "source": s} for s in sources], "seeds": [0, 1, 2]}


def alpha(project):
    return [verdict.status for _, verdict, _ in judge_paper(project / "out", project / "reproduce" / "alpha", "small")]


def test_the_report_of_nothing(project):
    text = write_report(project / "out", project / "reproduce", "quick").read_text()
    assert "| Alpha's title | 0 | 0 | 0 | 0 | 2 |" in text and "| beta | 0 | 0 | 0 | 0 | 2 |" in text
    assert text.index("## Alpha's title") < text.index("## beta") and str(project) not in text
    assert write_report(project / "out", project / "reproduce", "quick").read_text() == text


def test_each_record_is_judged_by_its_own_preset_and_source(project):
    falling = trend([[3, 3.1, 2.9], [2, 2.1, 1.9]])
    folder = project / "out" / "alpha" / "claims"
    for made_with, expected in ((("small", "standin"), ["holds", "needs real data"]),
                                (("smoke", "standin"), ["inconclusive", "needs real data"]),
                                (("small", "real", "standin"), ["holds", "needs real data"]),
                                (("small", "real"), ["holds", "not run"])):
        c.record(folder, "a", falling, origin(*made_with))
        assert alpha(project) == expected
    c.record(folder, "b", {"values": {"1": [0.55]}}, origin("paper", "real"))
    assert alpha(project) == ["holds", "holds"]


def test_report_tables_keep_their_columns(project):
    seen = trend([[3, None, 2.9], [2, 2.1, 1.9]])
    c.record(project / "out" / "alpha" / "claims", "a", seen, origin("small", "standin"))
    text = write_report(project / "out", project / "reproduce", "small").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ○") or "a \\| b" in line]
    assert rows and all(row.replace("\\|", "").count("|") == 8 for row in rows)


def test_broken_claims_stop_the_report_and_keep_the_old_one(project):
    path = write_report(project / "out", project / "reproduce", "small")
    old = path.read_text()
    (project / "reproduce" / "beta" / "claims.yaml").write_text("- id: [")
    with pytest.raises(LitvaeError, match="beta.claims.yaml is not valid YAML"):
        write_report(project / "out", project / "reproduce", "small")
    assert path.read_text() == old
