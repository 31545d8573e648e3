"""BCS-DBT: joined tables of several versions, volumes stored turned, boxes with 0-based slices."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.sources import bcs_dbt
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_b", Path(__file__).with_name("trees_b.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture
def root(tmp_path, breast, write_dicom) -> Path:
    return trees.make_bcs_dbt(tmp_path, breast, write_dicom)


def test_volumes_sides_and_splits(root):
    rows = bcs_dbt.list_files([root]).rows
    shown = [(row.patient, row.study, row.laterality, row.view, row.split) for row in rows]
    assert shown == [
        ("DBT-P00001", "DBT-S00001", "L", "CC", "train"),  # R in its header
        ("DBT-P00001", "DBT-S00001", "R", "MLO", "train"),
        ("DBT-P00002", "DBT-S00002", "L", "MLO", "train"),
        ("DBT-P00002", "DBT-S00002", "L", "MLO", "train"),  # lmlo2
        ("DBT-P00003", "DBT-S00003", "R", "CC", "val"),
        ("DBT-P00004", "DBT-S00004", "L", "CC", "test"),
        ("DBT-P00004", "DBT-S00004", "R", "CC", "test"),
        (None, None, None, None, None),  # in no table
    ]
    assert all(row.kind == "dbt" for row in rows)
    assert [row.upright for row in rows] == [True] * 7 + [False]
    assert [row.path.is_file() for row in rows] == [True] * 6 + [False, True]
    assert rows[3].path.name == "7f3e.dcm"  # by classic_path's folder
    assert rows[6].name.startswith("Breast-Cancer-Screening-DBT/DBT-P00004/01-01-2000")
    assert len({row.name for row in rows}) == 8


def test_labels(root):
    listing = bcs_dbt.list_files([root])
    labels = [
        [row.labels.get(f"label_{k}") for k in ("bcs", "cancer_biopsy", "lesion")] for row in listing.rows
    ]
    assert labels[:5] == [[0, 0, 0], [3, 1, 1], [0, 0, 0], [1, None, 1], [2, 0, 1]]
    assert all(row.labels == {} for row in listing.rows[5:])  # no labels of test: unknown, not normal
    assert set(listing.labels) == {"label_bcs", "label_cancer_biopsy", "label_lesion"}
    assert listing.labels["label_bcs"]["classes"] == ["normal", "actionable", "benign", "cancer"]


def test_boxes(root):
    rows = bcs_dbt.list_files([root]).rows
    (cancer,), (benign,) = rows[1].findings, rows[4].findings
    assert [cancer[k] for k in ("y0", "x0", "y1", "x1", "slice_index")] == [60, 90, 90, 110, 2]
    assert cancer["category"] == "lesion" and cancer["pathology"] == "cancer" and cancer["shape"] == "box"
    assert benign["category"] == "architectural_distortion" and benign["slice_index"] == 0  # 0-based
    assert sum(len(row.findings) for row in rows) == 2


def test_without_classic_path(root):
    table = root / "BCS-DBT-file-paths-train-v2.csv"
    lines = [line.rsplit(",", 1)[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines) + "\n")
    rows = bcs_dbt.list_files([root]).rows
    assert [row.path.is_file() for row in rows[:4]] == [True, True, True, False]
    assert [row.patient for row in rows if not row.split] == [None, None]  # that volume, unlabelled


@pytest.mark.parametrize(
    ("table", "old", "new", "expected"),
    [
        (
            "labels-train-v2",
            "lcc,1,0",
            "lcc,1,1",
            "labels-train-v2.csv line 2: expected a single 1 among Normal",
        ),
        ("labels-train-v2", "lcc,1,0", "lcc,2,0", "line 2, Normal: 2, expected a whole number from 0 to 1"),
        ("labels-train-v2", "Actionable", "Acted", "expected a column Actionable, found"),
        ("file-paths-test-v2", "lcc", "xcc", "line 2, View: xcc, expected lcc, lmlo, rcc or rmlo"),
        ("boxes-train-v2", "90,60,20,30", "90,60,,30", "line 2: expected numbers in X, Y, Width and Height"),
        ("boxes-train-v2", "cancer", "odd", "line 2, Class: odd, expected one of"),
    ],
)
def test_bad_tables(root, table, old, new, expected):
    path = root / f"BCS-DBT-{table}.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=expected):
        bcs_dbt.list_files([root])


def test_no_table(tmp_path):
    with pytest.raises(UserError, match=r"holds no .*file-paths"):
        bcs_dbt.list_files([tmp_path])
