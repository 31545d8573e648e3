"""VinDr-Mammo: the official test split, labels of breasts, findings in textual lists."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.sources import vindr
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_a", Path(__file__).with_name("trees_a.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture
def root(tmp_path, breast, write_dicom) -> Path:
    return trees.make_vindr(tmp_path, breast, write_dicom)


def by_image(root: Path) -> dict:
    return {row.path.stem: row for row in vindr.list_files([root]).rows}


def replace_in(root: Path, name: str, old: str, new: str) -> None:
    table = root / "vindr-mammo" / "1.0.0" / name
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))


def test_files_patients_and_splits(root):
    rows = by_image(root)
    shown = [(i, row.patient, row.laterality, row.view, row.split) for i, row in rows.items()]
    assert shown == [
        ("i11", "s1", "L", "CC", "trainval"),
        ("i12", "s1", "L", "CC", "trainval"),  # again, in place of the MLO: both stay
        ("i13", "s1", "R", "CC", "trainval"),
        ("i14", "s1", "R", "MLO", "trainval"),
        ("i21", "s2", "L", "MLO", "test"),
        ("i22", "s2", "R", "MLO", "test"),
        ("i31", "s3", "L", "CC", "trainval"),
        ("i32", "s3", "R", "CC", "trainval"),
        ("i41", "s4", "R", "MLO", "trainval"),
        ("extra", "s1", None, None, None),  # in no table, but of a known patient: splits stay whole
        ("i51", "s5", None, None, None),
    ]
    assert [i for i, row in rows.items() if not row.path.is_file()] == ["i32"]
    assert rows["i11"].name == "vindr-mammo/1.0.0/images/s1/i11.dicom"
    assert rows["extra"].labels == {} and rows["i51"].labels == {}


def test_labels_of_breasts(root):
    rows = by_image(root)
    names = ("density", "birads", "suspicious_birads45", "suspicious_birads5")
    labels = {i: tuple(row.labels.get(f"label_{name}") for name in names) for i, row in rows.items()}
    assert labels["i11"] == labels["i12"] == (2, 3, 1, 0)
    assert labels["i13"] == (1, 0, 0, 0)  # another density than the left breast
    assert labels["i21"] == (0, 4, 1, 1) and labels["i22"] == (0, 2, 0, 0) and labels["i31"] == (3, 1, 0, 0)
    assert labels["i41"] == (None,) * 4  # blank


def test_labels_and_boxes_of_findings(root):
    rows = by_image(root)
    names = ("lesion", "mass", "calcification")
    labels = {i: tuple(row.labels.get(f"label_{name}") for name in names) for i, row in rows.items()}
    assert labels["i11"] == (1, 1, 1)
    assert labels["i12"] == (0, 0, 0)  # No Finding, though the breast is BI-RADS 4
    assert labels["i21"] == (1, 0, 0) and labels["i22"] == (1, 0, 1)
    assert labels["i41"] == (None,) * 3  # not in the table of findings: unknown
    found = rows["i11"].findings
    assert [f["category"] for f in found] == ["mass", "suspicious_calcification", "skin_thickening"]
    assert [f["birads"] for f in found] == ["4", "4", "3"] and found[0]["shape"] == "box"
    for f in found[:2]:  # one each, of the same place; y before x
        assert [f[k] for k in ("y0", "x0", "y1", "x1")] == [60, 10.5, 90.25, 40.5]
    assert [f["y0"] for f in rows["i21"].findings] == [None]  # place unknown
    assert rows["i12"].findings == []


def test_meanings_and_terms(root):
    listing = vindr.list_files([root])
    assert {name for row in listing.rows for name in row.labels} == set(listing.labels)
    levels = {name: meaning["level"] for name, meaning in listing.labels.items()}
    assert levels["label_birads"] == levels["label_density"] == "breast" and levels["label_mass"] == "image"
    assert not any("cancer" in name for name in listing.labels)  # there is no biopsy
    assert "PhysioNet" in listing.terms


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("breast-level", "BI-RADS 5", "BI-RADS 6", "line 6, breast_birads: BI-RADS 6, expected one of"),
        ("breast-level", "DENSITY C", "C", "line 2, breast_density: C, expected one of DENSITY A"),
        ("breast-level", ",training", ",train", "line 2, split: train, expected training or test"),
        ("breast-level", "DENSITY C,training", "DENSITY C,", "line 2, split: blank, expected training or test"),
        ("breast-level", "view_position", "view", "expected a column view_position, found"),
        ("finding", "['Skin Thickening']", "Skin Thickening", "line 3, finding_categories: Skin Thickening"),
        ("finding", "90.25", "", "line 2: expected numbers in all of ymin, xmin, ymax, xmax"),
        ("finding", "90.25", "low", "line 2, ymax: low, expected a number"),
        ("finding", "i31", "i39", "line 9, image_id: i39, expected an image of the breast-level table"),
    ],
)  # fmt: skip
def test_bad_tables(root, name, old, new, expected):
    replace_in(root, f"{name}_annotations.csv", old, new)
    with pytest.raises(UserError, match=f"{name}_annotations.csv.*{expected}"):
        vindr.list_files([root])


def test_missing_tables(root):
    base = root / "vindr-mammo" / "1.0.0"
    (base / "finding_annotations.csv").unlink()
    with pytest.raises(UserError, match=r"finding_annotations\.csv is missing in"):
        vindr.list_files([root])
    (base / "breast-level_annotations.csv").unlink()
    with pytest.raises(UserError, match=r"holds no breast-level_annotations\.csv"):
        vindr.list_files([root])
