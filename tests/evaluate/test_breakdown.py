"""Breakdowns of scores whose AUC in each group is known."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mammodino_jax.evaluate.breakdown import breakdown, common, lesion_mm
from mammodino_jax.evaluate.items import group, read_rows
from mammodino_jax.evaluate.metrics import Scored
from mammodino_jax.evaluate.probes import Fold

N = 60
CANCER = np.arange(N) // 2 % 2  # of patient p; the vendor is p % 2, the fold p // 2 % folds
VENDOR = np.array(["AB"[p % 2] for p in range(N)])
SIZE = np.where(np.arange(N) % 4 == 2, 4.0, 14.0)  # mm of a patient's lesion, where there is one


@pytest.fixture(scope="module")
def make(labelled, tmp_path_factory):
    """make(findings, change) -> Rows of an image a patient; `change(p, row)` edits index rows."""

    def make(findings=(), change=lambda p, row: None, views=("CC",)):
        content = []
        for p in range(N):
            for view in views:
                image = labelled.breast(100, seed=p, height=20, width=12)
                box = {"box_y0": 10, "box_y1": 50, "box_x0": 0, "box_x1": 24}  # half the source's resolution
                row = labelled.make_dataset.row(
                    image, f"i{p}-{view}", patient_id=f"p{p}", study_id=f"s{p}", view=view, split="train",
                    manufacturer=VENDOR[p], pixel_hash=f"h{p}-{view}", label_cancer=int(CANCER[p]), **box,
                )  # fmt: skip
                change(p, row)
                content.append((image, row))
        folder = labelled.write(tmp_path_factory.mktemp("rows") / "data", content)
        labelled.make_dataset.write_findings(folder, findings)
        return read_rows([folder])

    return make


def cut(rows, score, *columns, level="image", label=CANCER, folds=3, repeats=1):
    """Breakdown of scores [N] or [N, C] of patients in `folds` folds by number."""
    items = group(rows, level)
    place = np.array([int(p[1:]) for p in items.patient])
    label, score = np.asarray(label)[place], np.asarray(score, float)[place]
    score = score if score.ndim == 2 else np.stack([-score, score], axis=1)
    parts = [np.flatnonzero(place // 2 % folds == k) for k in range(folds)] * repeats
    empty = np.zeros(0, np.int64)
    scored = [
        Scored(items.patient[part], label[part], score[part], score[part].argmax(axis=1)) for part in parts
    ]
    tests = [Fold(empty, empty, part) for part in parts]
    return breakdown(rows, items, np.arange(len(items.id)), tests, scored, columns, 1000, 0)


def test_each_group_has_its_own_auc_and_folds_are_not_pooled(make):
    # right for vendor A, wrong for B; every fold has its own scale, which pooled scores would mix up
    scale = 100 * (np.arange(N) // 2 % 3)
    score = np.where(VENDOR == "A", CANCER + scale, -CANCER - scale)
    found = cut(make(), score, "manufacturer")["manufacturer"]
    assert list(found) == ["A", "B"]
    assert found["A"] == {"n": 30, "positive": 15, "auc": 1.0, "low": 1.0, "high": 1.0}
    assert (found["B"]["n"], found["B"]["positive"], found["B"]["auc"]) == (30, 15, 0.0)


def test_the_auc_is_the_mean_over_folds_of_scikit_learns(make):
    score = np.random.default_rng(0).normal(size=N) + CANCER
    found = cut(make(), score, "manufacturer")["manufacturer"]
    for vendor, inside in (("A", VENDOR == "A"), ("B", VENDOR == "B")):
        parts = [inside & (np.arange(N) // 2 % 3 == k) for k in range(3)]
        expected = np.mean([roc_auc_score(CANCER[part], score[part]) for part in parts])
        assert found[vendor]["auc"] == pytest.approx(expected)
        assert found[vendor]["low"] < expected < found[vendor]["high"]


def test_groups_of_fewer_than_five_of_a_class_are_listed_but_not_computed(make):
    positives, negatives = np.flatnonzero(CANCER), np.flatnonzero(CANCER == 0)
    site = np.full(N, None, object)
    site[[*positives[:4], *negatives[:5]]] = "few"
    site[[*positives[4:9], *negatives[5:10]]] = "five"
    found = cut(make(change=lambda p, row: row.update(site=site[p])), CANCER, "site")["site"]
    assert list(found) == ["few", "five", "unknown"]
    assert found["few"] == {"n": 9, "positive": 4, "auc": None, "low": None, "high": None}
    assert (found["five"]["n"], found["five"]["auc"]) == (10, 1.0)


def test_sizes_are_those_of_the_largest_finding_and_share_the_negatives(make):
    # records have half the source's resolution at 0.2 mm: a source pixel is 0.1 mm
    findings = [
        {"image_id": f"i{p}-CC", "y0": 5.0, "x0": 1.0, "y1": 8.0, "x1": 1.0 + 10 * SIZE[p]}
        for p in np.flatnonzero(CANCER)[:-6]
    ]
    findings += [
        {"image_id": "i2-CC", "y0": 5.0, "x0": 1.0, "y1": 45.0, "x1": 9.0},  # as large, and upright
        {"image_id": "i2-CC", "category": "somewhere"},
        {"image_id": "gone", "y0": 0.0, "x0": 0.0, "y1": 900.0, "x1": 900.0},
        {"image_id": "i0-CC", "y0": 0.0, "x0": 0.0, "y1": 900.0, "x1": 900.0},  # of a negative
    ]
    rows = make(findings)
    mm = lesion_mm(rows, group(rows))
    np.testing.assert_allclose(mm[[2, 3]], [4, 14], rtol=1e-6)
    assert np.isnan(mm[1])
    score = np.where(CANCER == 1, np.where(SIZE == 14, 1, -1), 0)  # large lesions are found, small ones not
    found = cut(rows, score, "lesion_size")["lesion_size"]
    negatives = int((CANCER == 0).sum())
    assert list(found) == ["0 to 5 mm", "10 to 20 mm", "unknown"]
    small, large, unknown = found.values()
    assert (small["auc"], large["auc"]) == (0.0, 1.0)
    for groups in found.values():
        assert groups["n"] == groups["positive"] + negatives
    assert small["positive"] + large["positive"] + unknown["positive"] == CANCER.sum()
    assert unknown["positive"] == 6


def test_types_and_labels_of_positives_share_the_negatives(make):
    def change(p, row):
        mass = p % 4 == 2
        row |= {"label_mass": int(mass), "label_calcification": int(p % 4 == 3)} if CANCER[p] else {}
        row["label_invasive"] = int(mass) if CANCER[p] else None

    found = cut(make(change=change), np.where(np.arange(N) % 4 == 2, 1, 0), "lesion_type", "invasive")
    mass, calcification = (found["lesion_type"][name] for name in ("mass", "calcification"))
    assert (mass["auc"], calcification["auc"]) == (1.0, 0.5)
    assert mass["n"] == 15 + 30 and set(found["lesion_type"]) == {"mass", "calcification"}
    assert [found["invasive"][name]["auc"] for name in ("0", "1")] == [0.5, 1.0]


def test_items_tested_in_several_repeats_count_once(make):
    found = cut(make(), CANCER, "manufacturer", repeats=2)["manufacturer"]
    assert [g["n"] for g in found.values()] == [30, 30]


def test_a_breast_whose_images_differ_is_mixed(make):
    def change(p, row):
        row["label_density"] = p // 4 % 2 + (p < 20 and row["view"] == "MLO")
        row["implant"] = p // 4 % 2 == 0

    rows = make(change=change, views=("CC", "MLO"))
    found = cut(rows, CANCER, "view", "density", "implant", level="breast")
    assert "view" not in found  # all are mixed
    assert list(found["density"]) == ["A", "B", "mixed"]
    assert found["density"]["mixed"]["n"] == 20
    assert found["implant"]["yes"]["n"] + found["implant"]["no"]["n"] == N
    assert set(cut(rows, CANCER, "view")["view"]) == {"CC", "MLO"}


def test_what_one_record_says_is_enough_and_none_is_unknown(make):
    rows = make(views=("CC", "MLO"))
    said = np.array([None, "a", "a", "a", None, None, "a", "b"] + [None] * (2 * N - 8), object)
    value = common(group(rows, "breast"), said)
    assert value.tolist() == ["a", "a", None, "mixed"] + [None] * (N - 4)


def test_columns_that_tell_nothing_are_left_out(make):
    rows = make(change=lambda p, row: row.update(label_density=p // 2 % 2))
    assert cut(rows, CANCER, "kind", "no such label", "lesion_type", "density", "cancer", "lesion_size") == {}


def test_more_than_two_classes_are_macro_averaged_and_have_no_lesions(make):
    label = np.arange(N) // 2 % 3
    score = np.eye(3)[label]
    score[VENDOR == "B"] = np.random.default_rng(0).uniform(size=(N // 2, 3))
    findings = [{"image_id": "i0-CC", "y0": 0.0, "x0": 0.0, "y1": 9.0, "x1": 9.0}]
    found = cut(make(findings), score, "manufacturer", "lesion_size", label=label, folds=2)
    assert set(found) == {"manufacturer"}
    assert found["manufacturer"]["A"]["auc"] == 1.0 and found["manufacturer"]["A"]["positive"] is None
    parts = [(VENDOR == "B") & (np.arange(N) // 2 % 2 == k) for k in range(2)]
    expected = np.mean([roc_auc_score(label[b] == c, score[b, c]) for b in parts for c in range(3)])
    assert found["manufacturer"]["B"]["auc"] == pytest.approx(expected)


def test_resolution_is_in_thirds_of_the_records_mm_per_px(make):
    found = cut(
        make(change=lambda p, row: row.update(pixel_mm=0.1 + p / 1000 if p else None)), CANCER, "resolution"
    )
    thirds = found["resolution"]
    assert list(thirds) == ["0.101 to 0.120 mm/px", "0.121 to 0.139 mm/px", "0.140 to 0.159 mm/px", "unknown"]
    assert [g["n"] for g in thirds.values()] == [20, 19, 20, 1]


def test_findings_of_a_volume_count_whether_or_not_their_slice_is_known(labelled, tmp_path):
    volume = labelled.make_dataset.volume
    content = [one for name in ("v0", "v1", "v2") for one in volume(name, 3, split="train")]
    for _, row in content:
        row |= {"box_y0": 0, "box_y1": 60, "box_x0": 0, "box_x1": 40, "pixel_hash": row["image_id"]}
    folder = labelled.write(tmp_path / "data", content)
    corners = {"y0": 0.0, "x0": 0.0, "x1": 1.0}
    labelled.make_dataset.write_findings(folder, [
        {"volume_id": "v0", "image_id": "v0-1", "y1": 10.0} | corners,
        {"volume_id": "v1", "y1": 20.0} | corners,
    ])  # fmt: skip
    rows = read_rows([folder])
    np.testing.assert_allclose(lesion_mm(rows, group(rows)), [2, 4, np.nan], rtol=1e-6)
