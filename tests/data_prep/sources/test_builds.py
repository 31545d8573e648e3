"""Every source's miniature tree through the real build: records, splits, labels, terms."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data_prep.build import BuildOptions, build
from mammodino_jax.data import records


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TREES = {
    name: (module, f"make_{name}")
    for module, names in (
        ("trees_a", ("vindr", "rsna", "embed", "cmmd")),
        ("trees_b", ("cbis_ddsm", "inbreast", "bcs_dbt", "mias")),
    )
    for name in names
}


@pytest.mark.parametrize("source", TREES)
def test_builds(tmp_path, breast, write_dicom, source):
    module, make = TREES[source]
    root = tmp_path / source
    root.mkdir()
    root = getattr(_load(module), make)(root, breast, write_dicom) or root
    out = tmp_path / "out"
    counts = build(BuildOptions((root,), out, source=source, key=str(tmp_path / "key")))
    rows = pq.read_table(out / "index.parquet").to_pylist()
    assert counts["records"] == len(rows) >= 3
    for row in rows:
        assert row["dataset"] == source and row["laterality"] in ("L", "R", None)
    for patient in {row["patient_id"] for row in rows}:
        assert len({row["split"] for row in rows if row["patient_id"] == patient}) == 1
    meanings = json.loads((out / "labels.json").read_text())
    labels = {name for row in rows for name in row if name.startswith("label_")}
    assert labels == set(meanings) and all(
        {"classes", "rule", "level"} <= meanings[name].keys() and meanings[name]["classes"] for name in labels
    )
    assert any(row[name] is not None for row in rows for name in labels)
    prep = records.read_prep(out)
    assert prep["terms"][source] and prep["no_release"] == (["embed"] if source == "embed" else [])
    assert "failed" not in prep["rejects"]
    findings = pq.read_table(out / "findings.parquet").to_pylist()
    placed = [f for f in findings if f["record_y0"] is not None]
    assert placed or source in ("rsna", "cmmd")
    shapes = {row["image_id"]: (row["height"], row["width"]) for row in rows}
    inside = [  # invented boxes may miss the invented breasts, but not all of them
        f["record_y1"] > 0
        and f["record_x1"] > 0
        and f["record_y0"] < shapes[f["image_id"]][0]
        and f["record_x0"] < shapes[f["image_id"]][1]
        for f in placed
        if f["image_id"]
    ]
    assert any(inside) or not inside


def test_a_turned_volume_is_turned_back_with_its_boxes(tmp_path, breast, write_dicom):
    """BCS-DBT: boxes are given in the upright image; the record shows there what was marked."""
    root = tmp_path / "bcs"
    (root / "a").mkdir(parents=True)
    upright = np.stack([breast(200, 160, seed=3)] * 3)
    upright[:, 90:102, 40:52] = 4095
    write_dicom(root / "a/v.dcm", upright[:, ::-1, ::-1].copy(), ImageLaterality="R")
    for name, text in {
        "BCS-DBT-file-paths-train-v2.csv": "PatientID,StudyUID,View,descriptive_path,classic_path\nP,S,lmlo,a/v.dcm,a/v.dcm\n",
        "BCS-DBT-labels-train-v2.csv": "PatientID,StudyUID,View,Normal,Actionable,Benign,Cancer\nP,S,lmlo,0,0,0,1\n",
        "BCS-DBT-boxes-train-v2.csv": "PatientID,StudyUID,View,Subject,Slice,X,Y,Width,Height,Class,AD,VolumeSlices\nP,S,lmlo,1,1,40,90,12,12,cancer,0,3\n",
    }.items():
        (root / name).write_text(text)
    out = tmp_path / "out"
    build(BuildOptions((root,), out, source="bcs_dbt", key=str(tmp_path / "key")))
    row = pq.read_table(out / "index.parquet").to_pylist()[1]
    assert "upside_down" in row["flags"] and row["flipped"] and row["laterality"] == "L"
    assert "laterality_conflict" not in row["flags"]
    f = pq.read_table(out / "findings.parquet").to_pylist()[0]
    assert f["image_id"] == row["image_id"] and (f["y0"], f["x0"]) == (200 - 102, 160 - 52)
    (path,) = records.shard_paths(out, "train")
    image = records.decode(ArrayRecordReader(path).read_all()[1])["image"]
    y0, x0, y1, x1 = (round(f[f"record_{c}"]) for c in ("y0", "x0", "y1", "x1"))
    assert image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].min() > 230 > image[y0:y1, x1 + 3 : x1 + 8].mean()
