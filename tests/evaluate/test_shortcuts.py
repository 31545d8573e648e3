"""Shortcut probes on features that code what they should find, and on noise."""

import argparse
import dataclasses
import json
import types
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mammodino_jax import charts
from mammodino_jax.evaluate import extras, shortcuts
from mammodino_jax.evaluate.items import read_rows

WIDTH = 16


def table(patients=40, slices=8, seed=0):
    """Rows of patients with a 2D image of each view and side, and a volume of each side."""
    rng, records = np.random.default_rng(seed), []
    for p in range(patients):
        ids = {"patient_id": f"p{p:02d}", "manufacturer": "GE" if p % 2 else "Hologic", "dataset": "d"}
        ids["site"] = "main" if p > 4 else "branch"  # five patients: not asked
        for side in "LR":
            area = {
                "height": 1000.0,
                "width": float(rng.integers(300, 900)),
                "coverage": 0.7,
                "pixel_mm": 0.2,
            }
            one = {**ids, "laterality": side, "volume_id": None, "kind": "2d", "slice_mm": np.nan}
            for view in ("CC", "MLO"):
                records.append({**one, **area, "view": view, "slice_index": np.nan, "num_slices": np.nan})
            one |= {"kind": "dbt", "volume_id": f"v{p}{side}", "slice_mm": 1.0, "view": "CC"}
            for s in range(slices):
                records.append({**one, **area, "slice_index": float(s), "num_slices": float(slices)})
    records = [records[i] for i in rng.permutation(len(records))]
    columns = {}
    for name in records[0]:
        values = [record[name] for record in records]
        columns[name] = np.array(values, None if isinstance(values[0], float) else object)
    columns["image_id"] = np.array([f"i{i}" for i in range(len(records))], object)
    return Rows(columns, {"cancer": np.array([int(r["patient_id"][1:]) % 2 for r in records])})


@dataclasses.dataclass(frozen=True)
class Rows:
    columns: dict
    labels: dict

    def __len__(self):
        return len(self.columns["patient_id"])


@pytest.fixture(scope="module")
def rows():
    return table()


def noise(rows, seed=1):
    return np.random.default_rng(seed).normal(size=(len(rows), WIDTH)).astype(np.float32)


def coded(rows, column, strength=8.0):
    """Noise with a random direction for each value of a column."""
    _, code = np.unique(rows.columns[column].astype(str), return_inverse=True)
    directions = np.random.default_rng(2).normal(size=(code.max() + 1, WIDTH))
    return (noise(rows) + strength * directions[code]).astype(np.float32)


def ask(rows, x):
    found = shortcuts.run(rows, {"x": x}, 500, 0)
    return {row["probe"]: row for row in found["rows"]}, found


def test_noise_is_at_chance(rows):
    found, all_of_it = ask(rows, noise(rows))
    json.dumps(all_of_it, allow_nan=False)  # as results.json has it
    assert set(all_of_it["not_asked"]) == {"site", "dataset", "mm per px"}
    assert "branch: 5, main: 35" in all_of_it["not_asked"]["site"]
    assert all_of_it["looked_at"] == all_of_it["of"] == 40 * 6
    for probe, row in found.items():
        assert row["low"] - 0.03 <= row["chance"] <= row["high"] + 0.03, probe
        assert row["patients"] == 40, probe
    assert found["patient"]["n"] == 240 and found["slice depth"]["n"] == 80
    assert found["kind"]["values"] == ["2d", "dbt"]
    assert found["patient"]["chance"] == pytest.approx(5 / 239)


def one(rows, probe, x):
    return shortcuts.PROBES[probe](rows, x, shortcuts.representatives(rows), 500, 0)


@pytest.mark.parametrize("column", ("manufacturer", "laterality", "view", "kind"))
def test_what_features_code_is_predicted(rows, column):
    found = one(rows, column, coded(rows, column))
    assert found["value"] > 0.99
    assert found["chance"] == 0.5


def test_a_coded_patient_is_retrieved(rows):
    for probe in ("patient", "patient, from another view", "patient, from the other side"):
        assert one(rows, probe, coded(rows, "patient_id"))["value"] > 0.99, probe


def test_patient_retrieval_without_the_own_side(rows):
    """Features of a breast find the same breast, and nothing of the other side."""
    c = rows.columns
    breast = np.array([f"{p}{s}" for p, s in zip(c["patient_id"], c["laterality"], strict=True)])
    copy = Rows({**c, "breast": breast}, rows.labels)
    x = coded(copy, "breast")
    assert one(copy, "patient", x)["value"] > 0.99
    assert one(copy, "patient, from the other side", x)["value"] < 0.15


def test_depth_and_area_are_predicted_with_patients_apart(rows):
    c, x = rows.columns, noise(rows)
    x[:, 0] = np.nan_to_num(c["slice_index"])
    x[:, 1] = c["width"] / 100
    depth, area = one(rows, "slice depth", x), one(rows, "breast area", x)
    assert depth["value"] > 0.95 and depth["r2"] > 0.9
    assert area["value"] > 0.95 and area["unit"] == "mm2"
    of, patient = np.unique(c["patient_id"].astype(str), return_inverse=True)
    own = np.random.default_rng(4).uniform(0.05, 0.1, len(of))[patient]
    copy = Rows({**c, "pixel_mm": own}, rows.labels)  # the patient tells it, but only of patients seen before
    assert one(copy, "mm per px", np.eye(len(of))[patient])["value"] < 0.3


def test_unknown_pixel_sizes_give_an_area_in_px(rows):
    copy = Rows({**rows.columns, "pixel_mm": np.full(len(rows), np.nan)}, rows.labels)
    assert one(copy, "breast area", noise(copy))["unit"] == "px"
    with pytest.raises(shortcuts._NotAskedError, match="known for 0 patients, 10 are needed"):
        one(copy, "mm per px", noise(copy))


def test_small_data_say_what_is_missing():
    few = table(patients=4, slices=3)
    found, all_of_it = ask(few, noise(few))
    assert set(found) == {"patient", "patient, from another view", "patient, from the other side"}
    assert all_of_it["not_asked"]["slice depth"] == "no volume of 5 slices"
    assert all_of_it["not_asked"]["breast area"] == "known for 4 patients, 10 are needed"


def test_large_data_are_cut_by_whole_patients(rows, monkeypatch):
    monkeypatch.setattr(shortcuts, "MOST", 62)
    monkeypatch.setattr(shortcuts, "PROBES", {"patient": shortcuts.retrieve})
    found = shortcuts.run(rows, {"x": noise(rows)}, 500, 0)
    assert (found["looked_at"], found["of"]) == (60, 240)
    patient = rows.columns["patient_id"]
    kept = shortcuts._whole_patients(rows, shortcuts.representatives(rows), 0)
    assert (np.unique(patient[kept].astype(str), return_counts=True)[1] == 6).all()


def test_correlation_of_weighted_ranks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    weights = rng.integers(0, 3, 30)
    again = np.repeat(np.arange(30), weights)
    expected = [np.corrcoef(a, b)[0, 1], np.corrcoef(a[again], b[again])[0, 1]]
    np.testing.assert_allclose(shortcuts._correlation(a, b, np.stack([np.ones(30), weights])), expected)
    assert shortcuts._correlation(a, np.ones(30)) == 0


def test_cross_slice_falls_with_the_offset_and_only_within_volumes():
    rows = table(patients=12, slices=12)
    x, c = noise(rows) / 10, rows.columns
    depth, walk = np.nan_to_num(c["slice_index"]), np.random.default_rng(3)
    for v in set(c["volume_id"]) - {None}:
        mine = np.flatnonzero(c["volume_id"] == v)
        steps = walk.normal(size=(12, WIDTH)).cumsum(axis=0)
        x[mine] += steps[depth[mine].astype(int)]
    found = shortcuts.cross_slice(rows, {"walk": x, "noise": noise(rows)})["walk"]
    assert (found["offsets"], found["volumes"], found["gap_mm"]) == (list(range(1, 11)), 24, 1.0)
    within = np.array(found["within"])
    assert (np.diff(within) < 0.02).all() and within[0] > within[-1] + 0.3
    assert np.abs(found["across"]).max() < 0.15
    for d, difference in enumerate(found["difference"]):
        assert difference["value"] == pytest.approx(within[d] - found["across"][d])
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert difference["n"] == 24


def test_cross_slice_compares_at_equal_depth():
    """Features that say the depth alone: what is far off in depth is unlike within and across alike."""
    rows = table(patients=12, slices=12)
    angle = np.nan_to_num(rows.columns["slice_index"]) / 11 * np.pi
    found = shortcuts.cross_slice(rows, {"x": np.stack([np.cos(angle), np.sin(angle)], axis=1)})["x"]
    np.testing.assert_allclose(found["within"], found["across"], atol=1e-6)
    assert found["within"][0] > 0.8 > 0 > found["within"][-1]


def test_cross_slice_of_short_volumes_one_patient_or_none():
    short = table(patients=3, slices=4)
    found = shortcuts.cross_slice(short, {"x": noise(short)})["x"]
    assert [v is None for v in found["within"]] == [False] * 3 + [True] * 7
    assert ET.fromstring(charts.cross_slice({"a": found, "b": found})).tag.endswith("svg")
    one = table(patients=1, slices=4)
    found = shortcuts.cross_slice(one, {"x": noise(one)})["x"]
    assert found["within"][0] is not None and found["across"] == [None] * 10
    assert found["difference"][0]["value"] is None
    json.dumps(found, allow_nan=False)
    assert ET.fromstring(charts.cross_slice({"a": found})).tag.endswith("svg")
    assert shortcuts.cross_slice(table(patients=2, slices=0), {"x": np.zeros((8, 2))}) == {}


def test_neighbours_are_of_other_patients_and_queries_of_all_kinds(rows):
    x = coded(rows, "patient_id")
    found = shortcuts.neighbours(rows, x, 8, 0)
    patient, kind = rows.columns["patient_id"], rows.columns["kind"]
    queries = [of["query"] for of in json.loads(json.dumps(found, allow_nan=False))]
    assert len(set(queries)) == 8
    assert {(kind[q], rows.labels["cancer"][q]) for q in queries} == {
        (k, c) for k in ("2d", "dbt") for c in (0, 1)
    }
    for of in found:
        assert len(of["near"]) == 5 and of["cosine"] == sorted(of["cosine"], reverse=True)
        assert patient[of["query"]] not in patient[of["near"]]
    x = coded(rows, "manufacturer")
    for of in shortcuts.neighbours(rows, x, 4, 0):
        assert (rows.columns["manufacturer"][of["near"]] == rows.columns["manufacturer"][of["query"]]).all()


def test_neighbours_of_one_patient_are_none():
    one = table(patients=1, slices=2)
    assert [of["near"] for of in shortcuts.neighbours(one, noise(one), 2, 0)] == [[], []]


def test_only_records_that_test_are_asked_and_the_cache_knows_labels(labelled, tmp_path):
    folder = labelled.write(tmp_path / "data", labelled.items(20))
    args = argparse.Namespace(parts=("cls",), draws=1000, seed=0, cache=tmp_path / "cache")

    def asked():
        rows = read_rows([folder])
        features = {"one": {"cls": noise(rows)}, "raw pixels": {"x": noise(rows)}}
        one = types.SimpleNamespace(name="one", rows=rows, extractor=1, encoder=1, remarks=("layout",))
        plain = types.SimpleNamespace(name="raw pixels", rows=rows, extractor=1, encoder=None, remarks=())
        tested = rows.columns["split"] == "test"
        found = extras.shortcut_probes(args, [plain, one], features, tested)
        return json.loads(json.dumps(found, allow_nan=False)), tested

    found, tested = asked()
    assert tested.sum() == 6 * 5 and found["shortcuts"]["records"] == 30
    assert found["shortcuts"]["of"] == 6 * 3 and found["cross_slice"]["one"]["volumes"] == 6
    assert {row["features"]: row["remarks"] for row in found["shortcuts"]["rows"]} == {
        "one": ["layout"], "raw pixels": [],
    }  # fmt: skip
    assert len(found["retrieval"]) == extras.QUERIES
    for one in found["retrieval"]:
        assert tested[[one["query"], *one["near"]]].all()  # places among all records
        assert len(one["near"]) == len(one["cosine"]) == 5
    files = len(list(args.cache.iterdir()))
    assert asked()[0] == found and len(list(args.cache.iterdir())) == files
    index = pq.read_table(folder / "index.parquet")
    vendor = index.column_names.index("manufacturer")
    for table in (
        index.append_column("label_recall", pa.array([0] * len(index))),
        index.set_column(vendor, "manufacturer", pa.array(["GE"] * len(index))),
    ):
        pq.write_table(table, folder / "index.parquet")
        asked()
        files += 1
        assert len(list(args.cache.iterdir())) == files
