"""INbreast: patients from file names, file names written as floats, BI-RADS with letters, outlines."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.sources import inbreast
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_b", Path(__file__).with_name("trees_b.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture
def root(tmp_path, breast, write_dicom) -> Path:
    return trees.make_inbreast(tmp_path, breast, write_dicom)


def by_name(root: Path) -> dict:
    return {row.path.stem.split("_")[0]: row for row in inbreast.list_files([root]).rows}


def test_files_patients_sides_and_views(root):
    rows = by_name(root)
    assert list(rows) == ["11", "12", "21", "22", "33", "44", "55"]  # no line of sums, nothing of the Mac's
    assert [row.patient for row in rows.values()] == ["aaaa", "aaaa", "bbbb", "bbbb", "33", "44", "cccc"]
    assert [row.laterality for row in rows.values()] == list("LLRRLLR")
    assert [row.view for row in rows.values()] == [
        "CC",
        "MLO",
        "CC",
        "MLO",
        "CC",
        "CC",
        "MLO",
    ]  # ML means MLO
    assert {row.pixel_mm for row in rows.values()} == {0.07} and {row.split for row in rows.values()} == {
        None
    }
    assert [row.path.is_file() for row in rows.values()] == [True] * 5 + [False, True]
    assert rows["55"].labels == {}  # unlisted: unknown, not negative


def test_patient_id_counts_where_it_is_not_blanked_and_no_hash_is_known(root):
    table = root / "INbreast Release 1.0" / "INbreast.csv"
    table.write_text(
        table.read_text("latin-1").replace("removed;removed;L;CC;201001;33", "7;50;L;CC;201001;33")
    )
    assert by_name(root)["33"].patient == "7" and by_name(root)["11"].patient == "aaaa"


def test_labels(root):
    rows = by_name(root)
    names = (
        "label_birads",
        "label_recall",
        "label_suspicious_birads45",
        "label_suspicious_birads5",
        "label_density",
    )
    labels = {name: tuple(row.labels.get(k) for k in names) for name, row in rows.items()}
    assert labels["11"] == (0, 0, 0, 0, 1)
    assert labels["12"] == (3, None, 1, 0, 1)  # 4c
    assert labels["22"] == (None, None, None, None, None)  # 6, and no ACR
    assert labels["33"] == (1, 0, 0, 0, 0)
    lesions = {
        n: [row.labels.get(f"label_{k}") for k in ("lesion", "mass", "calcification")]
        for n, row in rows.items()
    }
    assert lesions["11"] == [0, 0, 0]
    assert lesions["12"] == [1, 1, 1]  # an X, and an outline without an X
    assert lesions["21"] == [1, 0, 1]  # an outline only
    assert lesions["22"] == [1, 0, 1]  # two X, outlines unreadable
    assert lesions["44"] == [1, 0, 0]  # distortion
    listing = inbreast.list_files([root])
    assert {name for row in listing.rows for name in row.labels} == set(listing.labels)
    assert not any("cancer" in name for name in listing.labels)  # there is no biopsy


def test_findings_are_boxes_of_outlines(root):
    rows = by_name(root)
    mass, point = rows["12"].findings
    assert [mass[k] for k in ("y0", "x0", "y1", "x1")] == [60, 30.5, 91.5, 51]
    assert mass["category"] == "mass" and mass["birads"] == "4c" and mass["pathology"] is None
    assert [point[k] for k in ("y0", "x0", "y1", "x1")] == [80, 70, 81, 71]
    assert rows["22"].findings == []  # broken XML


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (";4c;", ";4d;", "INbreast.csv line 3, Bi-Rads: 4d, expected one of"),
        (";12.0;2;", ";12.0;5;", "line 3, ACR: 5, expected a whole number from 1 to 4"),
        (";12.0;", ";twelve;", "line 3, File Name: twelve, expected a number"),
        (";X;;;;massa", ";yes;;;;massa", "line 3, Mass: YES, expected one of X"),
        ("Bi-Rads", "BIRADS", "expected a column Bi-Rads, found"),
    ],
)
def test_bad_tables(root, old, new, expected):
    table = root / "INbreast Release 1.0" / "INbreast.csv"
    table.write_text(table.read_text("latin-1").replace(old, new, 1))
    with pytest.raises(UserError, match=expected):
        inbreast.list_files([root])


def test_a_spreadsheet_has_to_be_saved_as_csv(root):
    table = root / "INbreast Release 1.0" / "INbreast.csv"
    table.rename(table.with_suffix(".xls"))
    with pytest.raises(UserError, match=r"INbreast\.xls: a spreadsheet; save it as INbreast\.csv"):
        inbreast.list_files([root])
    table.with_suffix(".xls").unlink()
    with pytest.raises(UserError, match=r"holds no INbreast\.csv"):
        inbreast.list_files([root])
