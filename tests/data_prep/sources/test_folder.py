"""A folder with the users' own tables: our columns, their columns, backslashes."""

from pathlib import Path

import pytest

from data_prep.sources import folder
from mammodino_jax.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "a/2.png", "3.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def by_name(root: Path, columns=None) -> dict:
    return {row.name: row for row in folder.list_files([root], columns).rows}


def test_all_columns(root):
    (root / "labels.csv").write_text(
        "file,patient_id,study_id,laterality,view,split,kind,site,manufacturer,model,implant,pixel_mm,label_x\n"
        "a/1.png,P1,S1,l,mlo,Train,FILM,Ward,GE MEDICAL SYSTEMS,Senographe Essential VERSION 1,true,0.05,2\n"
        "a/2.png,P2,,,,,,,,,0,,\n"
    )
    rows = by_name(root)
    row = rows["a/1.png"]
    assert (row.patient, row.study, row.laterality, row.view, row.split) == ("P1", "S1", "L", "MLO", "train")
    assert (row.kind, row.site, row.manufacturer, row.model) == ("film", "Ward", "GE", "SENOGRAPHE ESSENTIAL")
    assert row.implant is True and row.pixel_mm == 0.05 and row.labels == {"label_x": 2}
    other = rows["a/2.png"]
    assert other.implant is False and other.labels == {"label_x": None}
    assert other.kind is other.site is other.pixel_mm is other.study is None
    assert rows["3.png"].patient is None and rows["3.png"].labels == {}


def test_mapped_columns(root):
    (root / "labels.csv").write_text("Datei,PatNr,malign,Gewicht,view\na\\1.png,0012,1,60.5,CC\n")
    row = by_name(root, {"file": "Datei", "patient_id": "PatNr", "label_cancer": "malign"})["a/1.png"]
    assert row.patient == "0012" and row.labels == {"label_cancer": 1}  # an id is text
    assert row.view == "CC"  # ours already; Gewicht is left out


def test_backslashes_in_labels_and_findings(root):
    (root / "labels.csv").write_text("file,label_x\na\\2.png,1\n")
    (root / "findings.csv").write_text(
        "file,category,shape,y0,x0,y1,x1,slice_index\na\\2.png,mass,box,1,2,3,4,0\n"
    )
    row = by_name(root)["a/2.png"]
    assert row.labels == {"label_x": 1}
    (found,) = row.findings
    assert found == {
        "category": "mass",
        "birads": None,
        "pathology": None,
        "shape": "box",
        "y0": 1.0,
        "x0": 2.0,
        "y1": 3.0,
        "x1": 4.0,
        "slice_index": 0,
    }


@pytest.mark.parametrize(
    ("table", "columns", "expected"),
    [
        (
            "file,label_x\n3.png,1\n",
            {"patientid": "PatNr"},
            r"mapping: unknown column patientid.*\"patient_id\"",
        ),
        (
            "file,PatNr\n3.png,1\n",
            {"patient_id": "PatNo"},
            r"expected a column PatNo, found file, PatNr.*\"PatNr\"",
        ),
        ("file,PatNr\n3.png,1\n", None, "unknown column PatNr"),
        ("file,PatNr\n3.png,1\n", {}, "unknown column PatNr"),
        (
            "file,kind\n3.png,xray\n",
            None,
            "labels.csv line 2, kind: xray, expected one of 2d, synthetic2d, dbt, film",
        ),
        ("file,implant\n3.png,maybe\n", None, "line 2, implant: maybe, expected one of 0, 1, false, true"),
        ("file,pixel_mm\n3.png,-1\n", None, "line 2, pixel_mm: -1, expected a length above 0"),
        ("file,label_x\n3.png,1\n3.png,1\n", None, "line 3: the file is listed on line 2 already"),
    ],
)
def test_bad_tables(root, table, columns, expected):
    (root / "labels.csv").write_text(table)
    with pytest.raises(UserError, match=expected):
        folder.list_files([root], columns)
