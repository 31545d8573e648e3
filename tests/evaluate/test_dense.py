"""The dense probe on images whose lesions are known, and on candidates counted by hand."""

import argparse
import dataclasses
import json
import shutil
import types

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mammodino_jax.evaluate import dense, extras
from mammodino_jax.evaluate.items import group, read_rows
from mammodino_jax.evaluate.probes import Fold

PATCH, SIDE = 14, 280  # 20 x 12 patches an image, in which records are shown at their own size
LESION = 28


class Coded(dense.GreyPatches):
    """Tokens of noise around a common mean; those of bright (lesion) patches are moved by `shift`."""

    def __init__(self, shift):
        super().__init__(name="coded", dim=8, long_side=SIDE)
        object.__setattr__(self, "shift", shift)

    def __call__(self, images, sizes=None):
        bright = super().__call__(images)["patches"][..., 0] > 0.8
        rng = np.random.default_rng(int(images.astype(np.int64).sum()) % 2**31)
        x = rng.normal(0, 0.2, (*bright.shape, 8))
        x[..., 0] += 1
        x[bright, 1] += self.shift
        return {"patches": x.astype(np.float32)}


FRAME = 400, 300  # of the source files of images
BOX = {"L": (60, 0, 340, 168), "R": (60, 132, 340, 300)}  # of their records; those of R are mirrored


def box_of(side):
    box = dict(zip(("box_y0", "box_x0", "box_y1", "box_x1"), BOX[side], strict=True))
    return box | {"flipped": side == "R"}


def image(make_dataset, seed, lesion=None):
    out = np.minimum(make_dataset.breast(SIDE, 168, seed), 120)
    if lesion is not None:
        y, x = lesion
        out[y : y + LESION, x : x + LESION] = 255
    return out


@pytest.fixture(scope="module")
def dataset(labelled, tmp_path_factory):
    """27 patients: left and right CC view, the left with a lesion for two in three of them, the right without;
    and volumes of 4 slices of the same breasts with the lesion in slice 2, for the first 15."""
    make = labelled.make_dataset
    rng, content, findings = np.random.default_rng(0), [], []
    for p in range(27):
        where = PATCH * rng.integers(4, 14), PATCH * rng.integers(1, 5)
        split = ("train", "val", "test")[p % 3]
        box = dict(zip(("record_y0", "record_x0"), where, strict=True))
        box |= {"record_y1": where[0] + LESION, "record_x1": where[1] + LESION}
        ids = {"patient_id": f"p{p}", "view": "CC", "split": split}
        for side in "LR":
            seen = where if side == "L" and p % 9 < 6 else None
            picture, name = image(make, p, seen), f"{p}{side}"
            content.append((picture, make.row(picture, name, laterality=side, **box_of(side), **ids)))
            if seen:
                findings += [{"image_id": name, "category": c, **box} for c in ("mass", "calcification")]
            if p >= 15:
                continue
            for s, (_, row) in enumerate(make.volume(f"v{name}", 4, SIDE, 168, laterality=side, **ids)):
                picture = image(make, 100 * p + s, seen if s == 2 else None)
                row |= {"box_y0": 0, "box_x0": 0, "box_y1": 10 * SIDE, "box_x1": 1680}
                content.append((picture, row))
            if seen:
                findings.append({"volume_id": f"v{name}", "slice_index": 2, **box})
    findings.append({"volume_id": "v0R", "category": "of no known slice", **box})
    findings.append({"image_id": "elsewhere", **box})
    folder = labelled.write(tmp_path_factory.mktemp("dense") / "data", content)
    make.write_findings(folder, findings)
    rows = read_rows([folder])
    return rows, group(rows)


def folds(items):
    return [Fold(*(np.flatnonzero(np.equal(items.split, s)) for s in ("train", "val", "test")))]


def result(dataset, encoder, **changes):
    rows, items = dataset
    found = dense.run(rows, encoder, SIDE, items, changes.get("folds", folds(items)), 500, 0, batch_size=8)
    found = json.loads(json.dumps(found, allow_nan=False))  # as results.json has it
    return {row["unit"]: row for row in found["rows"]}, found["counts"]


def test_findings_become_lesions_once_a_box(dataset):
    found = dense.lesions(dataset[0])
    assert len(found.record) == 18 + 12  # images, and slices found by volume and number
    assert (found.elsewhere, len(found.unlocated)) == (1, 1)
    ids = dataset[0].columns["image_id"][found.record]
    assert all(name.startswith("v") == name.endswith("-2") for name in ids)


def test_a_feature_that_codes_the_lesion_finds_all(dataset):
    units, counts = result(dataset, Coded(3.0))
    assert counts == {"located": 30, "unlocated": 1, "of_records_not_in_use": 1}
    assert (units["image"]["images"], units["image"]["lesions"], units["image"]["normals"]) == (6, 6, 12)
    assert (units["volume"]["images"], units["volume"]["normals"]) == (4, 6)
    for row in units.values():
        for name in ("supervised", "left_right", "mean_distance"):
            assert row[f"{name}_auc"]["value"] == pytest.approx(1, abs=0.02), name
            assert row[f"{name}_rank"]["value"] == pytest.approx(1, abs=0.02), name
        assert [row["sensitivity"][rate]["value"] for rate in "1234"] == [1, 1, 1, 1]
        assert row["mean_sensitivity"] == {"value": 1, "low": 1, "high": 1}
        assert row["mm_per_px"] == pytest.approx(0.2)


def test_noise_is_one_half(dataset):
    units, _ = result(dataset, Coded(0.0))
    for row in units.values():
        for name in ("supervised_auc", "left_right_auc", "mean_distance_auc"):
            assert 0.2 < row[name]["value"] < 0.8
            assert abs(row[name.replace("auc", "rank")]["value"] - row["rank_chance"]) < 0.25
        assert row["rank_chance"] == pytest.approx(0.8, abs=0.01)  # the best of four patches
        assert row["sensitivity"]["1"]["value"] < 1
    low, high = units["image"]["supervised_auc"]["low"], units["image"]["supervised_auc"]["high"]
    assert low - 0.05 <= 0.5 <= high + 0.05


def test_grey_levels_see_a_bright_lesion(dataset):
    units, _ = result(dataset, dense.GreyPatches(PATCH, SIDE))
    assert units["image"]["features"] == "grey level of patches"
    assert units["image"]["supervised_auc"]["value"] > 0.99


def test_repeated_folds_count_an_image_once_and_a_fold_without_lesions_is_said(dataset):
    _, items = dataset
    once = folds(items)
    clear = np.flatnonzero(np.char.endswith(items.id.astype(str), "R"))
    without = Fold(clear, once[0].val, once[0].test)
    units, _ = result(dataset, Coded(3.0), folds=[*once, *once, without])
    row = units["image"]
    assert (row["images"], row["supervised_auc"]["n"], row["folds"]) == (6, 6, 2)
    assert row["folds_without_lesions"] == 1
    assert row["sensitivity"]["1"]["value"] == 1


class Air(dense.GreyPatches):
    """Tokens that say whether a patch is air, and nothing else."""

    def __call__(self, images, sizes=None):
        level = super().__call__(images)["patches"]
        level[..., 0], level[..., 1] = level[..., 0] > 0.02, 0
        return {"patches": level}


@pytest.fixture(scope="module")
def builds(dataset, labelled, tmp_path_factory):
    """The images as two builds: cropped, mirrored and masked; and whole frames as they are, squashed to a
    square, without masks."""
    rows, _ = dataset
    rows, make, content = rows.take(np.flatnonzero(rows.columns["kind"] == "2d")), labelled.make_dataset, []
    for i in range(len(rows)):
        frame, side = np.ones(FRAME, np.uint8), rows.columns["laterality"][i]
        (y0, x0, y1, x1), picture = BOX[side], np.maximum(rows.image(i), 1)
        frame[y0:y1, x0:x1] = picture[:, ::-1] if side == "R" else picture
        ids = {name: rows.columns[name][i] for name in ("patient_id", "view", "split", "laterality")}
        squashed = cv2.resize(frame, (300, 300), interpolation=cv2.INTER_AREA)
        box = {"box_y0": 0, "box_x0": 0, "box_y1": FRAME[0], "box_x1": FRAME[1], "mask_recipe": "none"}
        content.append((squashed, make.row(squashed, rows.columns["image_id"][i], **box, **ids)))
    folder = labelled.write(tmp_path_factory.mktemp("raw") / "data", content)
    findings = pq.read_table(rows.folders[0] / "findings.parquet").to_pylist()
    for f in findings:
        for name in ("record_y0", "record_y1"):  # all on the left: x is as it is
            f[name] = (f[name] + BOX["L"][0]) * 300 / FRAME[0]
    make.write_findings(folder, findings)
    raw = read_rows([folder])
    place = {image: i for i, image in enumerate(raw.columns["image_id"])}
    return rows, raw.take(np.array([place[image] for image in rows.columns["image_id"]]))


def test_a_build_without_masks_is_asked_about_the_tissue_of_one_with_masks(builds):
    main, raw = builds
    assert dense.reference_of([raw, main]) is main and dense.reference_of([raw]) is raw
    encoder, places = dense.GreyPatches(PATCH), [0, 1]
    assert [main.columns["laterality"][i] for i in places] == ["L", "R"]
    of_main = {i: found for i, *found in dense.grids(main, main, encoder, 560, 8, places)}
    for i, tokens, tissue, (y, x), side in dense.grids(raw, main, encoder, 560, 8, places):
        assert tissue.shape == (40, 40) and side == 300 / 40
        inside = tokens[..., 0] > 0.03  # air is 1 of 255
        assert (inside == (tissue > 0)).mean() > 0.98
        assert (tissue[:, :20].sum() > 10 * tissue[:, 20:].sum()) == (i == 0)  # as it was stored
        _, share, (main_y, main_x), _ = of_main[i]
        centre = [(tissue * of).sum() / tissue.sum() for of in (y[:, None], x)]
        expected = [(share * of).sum() / share.sum() for of in (main_y[:, None], main_x)]
        np.testing.assert_allclose(centre, expected, atol=0.01)  # heights, from the chest wall

    def auc(**reference):
        items = group(raw)
        found = dense.run(raw, Air(PATCH), 280, items, folds(items), 500, 0, 8, **reference)["rows"][0]
        return found["mean_distance_auc"]["value"], found["left_right_auc"]["n"], found["remarks"]

    with_air, _, said = auc()
    assert with_air > 0.8  # of a token that says air or tissue, and nothing of lesions
    assert said == ["no tissue mask in any build: air counts as tissue without a lesion"]
    value, pairs, said = auc(reference=main)
    assert value == pytest.approx(0.5, abs=0.06) and pairs == 6 and said == []


def test_lesions_and_candidates_of_squashed_records_are_measured_in_the_source(builds):
    main, raw = builds
    tables = []
    for rows in builds:
        found, items = dense.lesions(rows), group(rows)
        boxes = {}
        for i, box in zip(found.record.tolist(), found.box, strict=True):
            boxes[i] = box[None]
        number = {items.item[i]: u for u, i in enumerate(boxes)}
        tables.append(dense._truths(rows, "image", number, boxes, items))
    assert len(tables[0]) == 18
    np.testing.assert_allclose(*tables, atol=1e-3)  # float32 in the file
    right = np.flatnonzero(main.columns["laterality"] == "R")[0]
    for rows, point in ((main, (10, 20)), (raw, (70 * 300 / 400, 280))):
        offset, px = dense.to_source(rows, right)
        np.testing.assert_allclose(offset + px * point, (70, 280))
    upside_down = dataclasses.replace(main, columns={**main.columns, "flags": [["upside_down"]] * len(main)})
    offset, px = dense.to_source(upside_down, right)
    np.testing.assert_allclose(offset + px * (10, 20), (330, 280))
    encoder = dense.GreyPatches(PATCH)
    _, _, candidates = dense._score(
        raw, main, lambda places: dense.grids(raw, main, encoder, 560, 8, places), {}, items := group(raw),
        [(np.arange(len(items.first)), lambda tokens: 9 * tokens[..., 0].astype(np.float32))], {}, [right],
    )  # fmt: skip
    (found,) = candidates.values()
    assert 60 < found[:, 1].min() and found[:, 1].max() < 340 and 132 < found[:, 2].min() < found[:, 2].max()


def test_records_that_are_not_mirrored_have_no_other_breast(dataset, tmp_path):
    folder = shutil.copytree(dataset[0].folders[0], tmp_path / "data")
    prep = json.loads((folder / "prep.json").read_text())
    (folder / "prep.json").write_text(json.dumps({**prep, "settings": {"flip": "none"}}))
    rows = read_rows([folder])
    rows = rows.take(np.flatnonzero(rows.columns["kind"] == "2d"))
    units, _ = result((rows, group(rows)), Coded(3.0))
    assert units["image"]["left_right_auc"] == {"value": None, "low": None, "high": None, "n": 0}
    assert units["image"]["supervised_auc"]["value"] == pytest.approx(1, abs=0.02)
    assert units["image"]["remarks"] == [
        "no build with the chest wall on the left: not compared with the other breast"
    ]


def test_items_without_a_lesion_are_those_that_are_said_to_have_none(dataset):
    rows, _ = dataset
    found, c = dense.lesions(rows), rows.columns
    number = np.array([int(p[1:]) for p in c["patient_id"]])

    def normals(**labels):
        items = group(dataclasses.replace(rows, labels=labels))
        normal = dense._normals("image", items, np.arange(len(items.first)), found, 0)
        return sorted(items.id[normal])

    without = [f"{p}{side}" for p in range(27) for side in "LR" if side == "R" or p % 9 >= 6]
    assert normals() == sorted(without)

    def names(of):
        return sorted(name for name in without if int(name[:-1]) in of)

    lesion = np.where(number < 5, 0, np.where(number < 10, -1, 1))
    assert normals(lesion=lesion, cancer=lesion * 0) == names(range(5))
    cancer, suspicious = np.where(number == 3, 1, 0), np.where(number == 4, -1, 0)
    free = names([p for p in range(27) if p not in (3, 4)])
    assert normals(cancer_biopsy=cancer, suspicious_birads45=suspicious, density=cancer) == free


def test_figures_in_the_cache_are_of_these_findings_labels_and_pixels(dataset, tmp_path, monkeypatch):
    folders = [shutil.copytree(dataset[0].folders[0], tmp_path / name) for name in ("main", "other")]

    def change(folder, file, column, value):
        table = pq.read_table(folder / file)
        table = table.drop_columns([column] if column in table.column_names else [])
        pq.write_table(table.append_column(column, pa.array([value] * len(table))), folder / file)

    change(folders[1], "index.parquet", "mask_recipe", "none")
    args = argparse.Namespace(folds=0, seed=0, draws=1000, batch_size=0, cache=tmp_path / "cache")
    read = []

    def run(rows, encoder, *rest):
        read.append((rows.folders[0].name, rest[-1].folders[0].name))
        return {"rows": [{"unit": "image", "remarks": ["of the run"]}], "counts": {}}

    monkeypatch.setattr(dense, "run", run)

    def asked():
        main, other = (read_rows([folder]) for folder in folders)
        encoder = dense.GreyPatches(PATCH)
        one = {"encoder": encoder, "long_side": SIDE}
        entries = [
            types.SimpleNamespace(name="majority class", rows=main, encoder=None, long_side=None, remarks=()),
            types.SimpleNamespace(name="one", rows=main, remarks=("layout",), **one),
            types.SimpleNamespace(name="on raw", rows=other, remarks=(), **one),
        ]
        read.clear()
        found = extras.dense_probe(args, entries)["rows"]
        assert [row["remarks"] for row in found[1:]] == [["layout", "of the run"], ["of the run"]]
        return list(read)

    both = [("main", "main"), ("other", "main")]  # the grey levels are those of "one" here
    assert asked() == both and asked() == []

    for file, column, value in (
        ("findings.parquet", "record_y0", 0.0), ("index.parquet", "label_lesion", 0),
        ("index.parquet", "pixel_hash", "changed"),
    ):  # fmt: skip
        change(folders[1], file, column, value)
        assert asked() == both[1:], column
    change(folders[0], "index.parquet", "label_lesion", 0)
    assert asked() == both  # its items and its tissue stand for both


def test_data_without_located_findings_have_no_rows(labelled, tmp_path):
    folder = labelled.write(tmp_path / "data", labelled.items(3, slices=0))
    rows = read_rows([folder])
    found = dense.run(rows, Coded(1.0), SIDE, group(rows), folds(group(rows)), 500, 0)
    assert found == {"rows": [], "counts": {"located": 0, "unlocated": 0, "of_records_not_in_use": 0}}


def test_patches_of_lesions():
    tissue = np.ones((6, 6))
    tissue[:, 5] = 0.2
    lesion, normal = dense.patch_labels([(1.4, 1.6, 3.0, 3.0)], tissue)
    assert np.argwhere(lesion).tolist() == [
        [1, 2],
        [2, 2],
    ]  # 0.6 of it; all; column 1 is covered by 0.4 at most
    expected = np.ones((6, 6), bool)
    expected[0:4, 0:4], expected[:, 5] = False, False
    np.testing.assert_array_equal(normal, expected)


def test_a_lesion_smaller_than_a_patch_is_the_patch_that_holds_it():
    tissue = np.ones((4, 4))
    for box, expected in {
        (1.2, 1.2, 1.4, 1.4): [[1, 1]],
        (1.75, 1.25, 2.25, 1.5): [[1, 1], [2, 1]],  # a half in either
        (1.6, 1.6, 2.5, 2.5): [[2, 2]],  # a quarter or so in each of four: the centre's
        (1.5, 1.5, 1.5, 1.5): [[1, 1]],  # a point
    }.items():
        assert np.argwhere(dense.patch_labels([box], tissue)[0]).tolist() == expected
    beyond, normal = dense.patch_labels([(5, 5, 6, 6)], tissue)
    assert not beyond.any() and normal.all()


def test_auc_and_percentile_within_an_image():
    rng = np.random.default_rng(0)
    score, lesion = rng.normal(size=(8, 8)), np.zeros((8, 8), bool)
    lesion[2:4, 2:4] = True
    area, rank = dense.within_image(score, lesion, ~lesion)
    assert area == pytest.approx(roc_auc_score(lesion.ravel(), score.ravel()))
    assert rank == (score[~lesion] < score[lesion].max()).mean()
    assert np.isnan(dense.within_image(score, lesion & False, ~lesion)).all()
    assert dense.within_image(np.zeros((8, 8)), lesion, ~lesion) == (0.5, 0.5)


def test_left_right_compares_equal_places():
    rng = np.random.default_rng(0)
    tokens, tissue = rng.normal(size=(10, 6, 16)), np.ones((10, 6))
    centres = [(np.arange(n) + 0.5) / 10 for n in (10, 6)]
    one = tokens, tissue, centres
    np.testing.assert_allclose(dense.left_right(*one, *one), 0, atol=1e-6)
    for axis, shift in ((0, 5), (1, 3)):  # the same patches, half a breast away
        far = np.roll(tokens, shift, axis=axis)
        assert dense.left_right(*one, far, tissue, centres).min() > 0.1
    fine = tokens.repeat(2, axis=0).repeat(2, axis=1)  # another grid, of the same places
    places = [(np.arange(n) + 0.5) / 20 for n in (20, 12)]
    np.testing.assert_allclose(dense.left_right(*one, fine, np.ones((20, 12)), places), 0, atol=1e-6)
    nearly = np.zeros((10, 6))
    nearly[0, 0] = 1  # tissue of the other breast outside of most windows: compared all the same
    assert dense.left_right(*one, tokens, nearly, centres).max() < 2


def test_the_other_breast_is_of_the_same_study_view_and_depth(labelled):
    def rows(*records):
        names = ("patient_id", "study_id", "kind", "view", "laterality", "slice_index", "num_slices")
        columns = zip(*records, strict=True)
        return type("R", (), {"columns": dict(zip(names, map(list, columns), strict=True))})

    none = float("nan")
    flat = [("p", "s", "2d", v, side, none, none) for v, side in (("CC", "L"), ("MLO", "R"), ("CC", "R"))]
    other = [("p", "t", "2d", "CC", "L", none, none), ("q", "s", "2d", "CC", "L", none, none),
             ("p", "s", "2d", None, "L", none, none), ("p", "s", "2d", None, "R", none, none),
             ("p", "s", "2d", "CC", None, none, none)]  # fmt: skip
    assert dense.contralateral(rows(*flat, *other)) == {0: 2, 2: 0}
    left = [("p", None, "dbt", "CC", "L", float(s), 3.0) for s in range(3)]
    right = [("p", None, "dbt", "CC", "R", float(s), 5.0) for s in range(5)]
    found = dense.contralateral(rows(*left, *right))
    assert [found[i] for i in range(3)] == [3, 5, 7]


def test_suppression_keeps_the_best_of_a_neighbourhood():
    found = np.array([[0, 10, 10, 0.5], [0, 12, 10, 0.9], [5, 10, 10, 0.4], [0, 30, 10, 0.3]], float)
    np.testing.assert_array_equal(dense.suppress(found, 5, 2), found[[1, 2, 3]])
    assert dense.suppress(found[:0], 5, 2).shape == (0, 4)


def test_peaks_lie_on_tissue():
    probability, tissue = np.full((9, 9), 0.1), np.ones((9, 9))
    probability[2, 3] = probability[7, 7] = 1
    tissue[7, 7] = 0
    y, x, score = dense.peaks(probability, tissue)[np.argmax(dense.peaks(probability, tissue)[:, 2])]
    assert (y, x) == (2.5, 3.5) and 0.1 < score < 1


def test_froc_by_hand():
    # unit 0: lesion found at 0.9, false positive at 0.95; unit 1: lesion found at 0.5, three false positives
    candidates = np.array([
        [0, 0, 10, 10, 0.9], [0, 0, 11, 10, 0.2], [0, 0, 50, 50, 0.95],
        [1, 0, 12, 10, 0.5], [1, 0, 50, 50, 0.8], [1, 0, 60, 60, 0.7], [1, 0, 70, 70, 0.6],
    ])  # fmt: skip
    truths = np.array([[0, 0, 10, 10, 3, 0], [1, 0, 10, 10, 3, 0], [1, 0, 90, 90, 3, 0]], float)
    once = np.ones((1, 2))
    np.testing.assert_allclose(
        dense.froc(candidates, truths, once, (0, 0.5, 1, 2, 4)), [[0, 1 / 3, 1 / 3, 2 / 3, 2 / 3]]
    )
    # a unit that is drawn twice counts twice, among false positives and lesions
    np.testing.assert_allclose(dense.froc(candidates, truths, np.array([[2, 0]]), (0.5, 1)), [[0, 1]])
    # a unit without lesions and candidates makes false positives rarer
    np.testing.assert_allclose(dense.froc(candidates, truths, np.ones((1, 4)), (0.25, 1)), [[1 / 3, 2 / 3]])
    # a false positive with the score of the hit is there too at that threshold
    tie = np.array([[0, 0, 10, 10, 0.5], [0, 0, 50, 50, 0.5]])
    np.testing.assert_allclose(dense.froc(tie, truths[:1], np.ones((1, 1)), (0.5, 1)), [[0, 1]])
    assert np.isnan(dense.froc(tie, truths[:1], np.array([[0, 1]]), (1,))).all()


def test_dbtex_hits_need_a_near_slice():
    lesion = np.array([[0, 20, 100, 100, 30, 12.5]])
    for z, y, hit in ((20, 129, 1), (32, 100, 1), (33, 100, 0), (20, 131, 0)):
        found = dense.froc(np.array([[0, z, y, 100, 0.5]]), lesion, np.ones((1, 1)), (4,))
        assert found == hit


def test_the_reach_of_a_volume_is_100_source_pixels(dataset):
    rows, items = dataset
    found = dense.lesions(rows)
    record = found.record[rows.columns["kind"][found.record] == "dbt"][0]
    boxes = {record: np.array([[40, 50, 42, 54]])}
    (truth,) = dense._truths(rows, "volume", {items.item[record]: 0}, boxes, items)
    assert truth.tolist() == [0, 2, 410, 520, 100, 1]  # ten source px a record px; a quarter of four slices
