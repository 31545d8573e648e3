"""CBIS-DDSM: films merged from four tables, splits by patient, masks that may be swapped."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.sources import cbis_ddsm
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_b", Path(__file__).with_name("trees_b.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture
def root(tmp_path, breast, write_dicom) -> Path:
    return trees.make_cbis_ddsm(tmp_path, breast, write_dicom)


def by_film(root: Path) -> dict:
    return {(row.patient, row.laterality, row.view): row for row in cbis_ddsm.list_files([root]).rows}


def test_one_row_a_film_with_the_maximum_of_its_abnormalities(root):
    rows = by_film(root)
    assert len(rows) == len(cbis_ddsm.list_files([root]).rows) == 7  # no ROI mask, no cropped image
    assert all(row.kind == "film" for row in rows.values())
    assert rows["P_00001", "L", "CC"].labels == {
        "label_birads": 4,
        "label_recall": None,
        "label_suspicious_birads45": 1,
        "label_suspicious_birads5": 1,
        "label_density": 2,
        "label_cancer_biopsy": 1,
        "label_lesion": 1,
        "label_mass": 1,
        "label_calcification": None,  # the mass tables say nothing of it
    }
    assert rows["P_00001", "L", "MLO"].labels["label_cancer_biopsy"] == 0


def test_mass_and_calc_lines_of_a_film_become_one_row(root):
    row = by_film(root)["P_00002", "R", "CC"]
    assert row.path.is_file() and row.path.parts[-4] == "Mass-Training_P_00002_RIGHT_CC"
    assert (
        row.labels["label_mass"]
        == row.labels["label_calcification"]
        == row.labels["label_cancer_biopsy"]
        == 1
    )
    assert row.labels["label_birads"] == 3 and row.labels["label_density"] == 1
    assert [(f["category"], f["pathology"]) for f in row.findings] == [
        ("mass", "benign"),
        ("calcification", "malignant"),
    ]
    assert by_film(root)["P_00002", "R", "MLO"].labels["label_density"] is None  # written 0


def test_a_patient_of_both_splits_is_test_as_a_whole(root):
    splits = {(patient, row.split) for (patient, *_), row in by_film(root).items()}
    assert splits == {
        ("P_00001", "trainval"),
        ("P_00002", "test"),  # mass train and calc test
        ("P_00003", "trainval"),
        ("P_00004", "test"),
        ("P_00005", "trainval"),
    }


def test_newer_names_missing_and_unlisted_files(root):
    rows = by_film(root)
    newer = rows["P_00003", "L", "CC"]
    assert newer.path.name == "1-1.dcm" and newer.path.is_file()
    assert newer.labels["label_birads"] is None and newer.labels["label_recall"] == 1  # assessment 0
    assert newer.labels["label_mass"] is None and newer.labels["label_calcification"] == 1
    missing = rows["P_00004", "L", "CC"]
    assert not missing.path.exists() and missing.labels["label_cancer_biopsy"] == 1
    unlisted = rows["P_00005", "R", "MLO"]
    assert unlisted.path.is_file() and unlisted.labels == {} and unlisted.findings == []


def test_boxes_come_from_the_mask_that_has_the_size_of_the_film(root):
    rows = by_film(root)
    places = [tuple(f[k] for k in ("y0", "x0", "y1", "x1")) for f in rows["P_00001", "L", "CC"].findings]
    assert places == [trees.CBIS_BOX, trees.CBIS_BOX]  # the second is listed as the cropped image
    (newer,) = rows["P_00003", "L", "CC"].findings
    assert newer["y0"] == trees.CBIS_BOX[0] and newer["shape"] == "mask" and newer["birads"] == "0"
    (other_size,) = rows["P_00001", "L", "MLO"].findings
    assert other_size["y0"] is None and other_size["shape"] is None and other_size["category"] == "mass"
    assert rows["P_00004", "L", "CC"].findings[0]["y0"] is None  # neither film nor mask on disk


def test_labels_are_explained(root):
    listing = cbis_ddsm.list_files([root])
    assert {name for row in listing.rows for name in row.labels} == set(listing.labels)
    assert all(set(meaning) == {"classes", "rule", "level"} for meaning in listing.labels.values())
    assert "CC BY 3.0" in listing.terms


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "BENIGN_WITHOUT_CALLBACK",
            "BENING",
            r"mass_.*_train_set.csv line 2, pathology: BENING, expected one of",
        ),
        (
            "breast_density",
            "density",
            "mass_.*_train_set.csv: expected a column breast_density or breast density",
        ),
        ("assessment", "birads", "expected a column assessment, found"),
        (",LEFT,CC,1,", ",LEFT,XCC,1,", "line 2, image view: XCC, expected one of"),
        ("P_00001,3,LEFT,CC,1,", ",3,LEFT,CC,1,", "line 2, patient_id: blank"),
        ("P_00001,3,", "P_00001,7,", "line 2, breast density: 7, expected a whole number from 0 to 4"),
    ],
)
def test_bad_tables(root, old, new, expected):
    table = root / "mass_case_description_train_set.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=expected):
        cbis_ddsm.list_files([root])


def test_missing_table(root):
    (root / "calc_case_description_test_set.csv").unlink()
    with pytest.raises(UserError, match=r"holds no calc_case_description_test_set\.csv"):
        cbis_ddsm.list_files([root])
