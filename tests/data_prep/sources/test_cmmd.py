"""CMMD: labels of breasts from a spreadsheet, sides from headers, unlabelled contralateral breasts."""

import importlib.util
from pathlib import Path

import openpyxl
import pytest

from data_prep.sources import cmmd
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_a", Path(__file__).with_name("trees_a.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture
def root(tmp_path, breast, write_dicom) -> Path:
    return trees.make_cmmd(tmp_path, breast, write_dicom)


TABLE = "CMMD_clinicaldata_revision.xlsx"


def by_file(root: Path) -> dict:
    rows = {}
    for row in cmmd.list_files([root]).rows:
        rows[f"{row.patient}/{row.path.stem[-1]}"] = row
    return rows


def edit(root: Path, cell: str, value) -> None:
    book = openpyxl.load_workbook(root / TABLE)
    book.worksheets[0][cell] = value
    book.save(root / TABLE)


def test_files_and_patients(root):
    rows = by_file(root)
    assert list(rows) == [
        "D2-0004/1",  # its folder is a study UID
        *(f"D1-0001/{n}" for n in range(1, 5)),
        *("D1-0002/1", "D1-0002/2", "D2-0003/1", "D2-0003/2", "D2-0005/1"),
    ]
    name = "manifest-1616439774456/CMMD/D1-0001/07-18-2010-NA-NA-79377/1.000000-NA-70244/1-1.dcm"
    assert rows["D1-0001/1"].name == name and rows["D1-0001/1"].path == root / name
    assert {row.split for row in rows.values()} == {None}


def test_labels_of_breasts(root):
    rows = by_file(root)
    names = ("lesion", "mass", "calcification", "cancer_biopsy")
    labels = {i: tuple(row.labels.get(f"label_{name}") for name in names) for i, row in rows.items()}
    assert labels["D1-0001/3"] == labels["D1-0001/4"] == (1, 0, 1, 0)
    assert labels["D1-0002/2"] == (1, 1, 1, 1)
    assert labels["D1-0002/1"] == (
        1,
        1,
        0,
        0,
    )  # the other breast has its own line; the first file is the right
    assert labels["D2-0003/1"] == (1, 1, 1, 1)  # by Laterality; two lines
    assert labels["D2-0004/1"] == (1, 1, 0, 1)  # by PatientID


def test_what_has_no_line_or_no_side_is_unlabelled(root):
    rows = by_file(root)
    assert rows["D1-0001/1"].labels == rows["D1-0001/2"].labels == {}  # the contralateral breast
    assert rows["D2-0003/2"].labels == {}  # not readable: the core rejects it
    assert rows["D2-0005/1"].labels == {}


def test_labels_are_not_shared_between_rows(root):
    rows = by_file(root)
    rows["D1-0001/3"].labels["label_mass"] = 9
    assert rows["D1-0001/4"].labels["label_mass"] == 0


def test_meanings_and_terms(root):
    listing = cmmd.list_files([root])
    assert {name for row in listing.rows for name in row.labels} == set(listing.labels)
    assert {meaning["level"] for meaning in listing.labels.values()} == {"breast"}
    assert "CC BY 4.0" in listing.terms


@pytest.mark.parametrize(
    ("cell", "value", "expected"),
    [
        ("B2", "right", "xlsx line 2, LeftRight: RIGHT, expected one of L, R"),
        ("B3", None, "line 3: expected an ID1 and L or R in LeftRight"),
        ("E4", "masses", "line 4, abnormality: masses, expected one of mass, calcification, both"),
        ("F6", 1, "line 6, classification: 1, expected one of benign, malignant"),
        ("E1", "Abnormal", f"{TABLE}: expected a column abnormality, found ID1, LeftRight"),
    ],
)
def test_bad_tables(root, cell, value, expected):
    edit(root, cell, value)
    with pytest.raises(UserError, match=expected):
        cmmd.list_files([root])


def test_blank_cells_are_unknown(root):
    edit(root, "E2", None)
    edit(root, "F3", None)
    rows = by_file(root)
    assert rows["D1-0001/3"].labels == {"label_lesion": 1, "label_cancer_biopsy": 0}
    assert "label_cancer_biopsy" not in rows["D1-0002/2"].labels


def test_broken_and_missing_tables(root):
    (root / TABLE).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=f"{TABLE}: not a readable Excel file"):
        cmmd.list_files([root])
    (root / TABLE).unlink()
    with pytest.raises(UserError, match=f"holds no {TABLE}"):
        cmmd.list_files([root])
