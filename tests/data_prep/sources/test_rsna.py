"""RSNA: two sites with different labels, recalls, labels of cancers only."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.sources import rsna
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_a", Path(__file__).with_name("trees_a.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture
def root(tmp_path, breast, write_dicom) -> Path:
    return trees.make_rsna(tmp_path, breast, write_dicom)


def by_image(root: Path) -> dict:
    return {row.path.stem: row for row in rsna.list_files([root]).rows}


def replace_in(root: Path, old: str, new: str) -> None:
    assert old in (root / "train.csv").read_text()
    (root / "train.csv").write_text((root / "train.csv").read_text().replace(old, new, 1))


def test_files(root):
    rows = by_image(root)
    assert list(rows) == ["1", "2", "3", "4", "5", "6", "7", "8", "9", "70", "80", "90"]
    assert [i for i, row in rows.items() if not row.path.is_file()] == ["8"]
    assert [row.patient for row in rows.values()] == (
        ["10006"] * 2 + ["10011"] * 3 + ["10025"] * 3 + ["10038", "10008", "10011", "10099"]
    )
    assert [row.view for row in rows.values()][:10] == (
        ["CC", "CC", "CC", "MLO", "AT", "MLO", "MLO", "CC", "LMO", "MLO"]
    )
    assert {row.split for row in rows.values()} == {None}
    assert (rows["1"].site, rows["1"].model, rows["1"].implant) == ("site 2", "machine 29", False)
    assert (rows["6"].site, rows["6"].model, rows["6"].implant) == ("site 1", "machine 21", True)
    assert (rows["80"].site, rows["80"].implant, rows["80"].labels) == (None, None, {})  # in no table
    assert rows["70"].site == "site 2" and rows["70"].labels == {}  # of test.csv
    assert rows["70"].name == "test_images/10008/70.dcm"


def test_the_tables_may_lie_deeper_and_test_csv_be_absent(root, tmp_path_factory):
    (root / "test.csv").unlink()
    above = tmp_path_factory.mktemp("above")
    root.rename(above / "rsna")
    rows = rsna.list_files([above]).rows
    assert rows[0].name == "rsna/train_images/10006/1.dcm" and len(rows) == 12
    assert [row.path.stem for row in rows[9:]] == ["70", "80", "90"]  # 70 now in no table


def test_labels(root):
    rows = by_image(root)
    names = ("density", "birads", "recall", "cancer_biopsy", "invasive", "difficult_negative")
    labels = {i: tuple(row.labels.get(f"label_{name}") for name in names) for i, row in rows.items()}
    assert labels["1"] == (None, None, None, 1, 1, 0)
    assert labels["2"] == (None, None, None, 0, None, 0)  # the other breast; invasive only of cancers
    assert labels["3"] == (2, 0, 0, 0, None, 0) and labels["4"] == labels["5"] == (2, 1, 0, 0, None, 0)
    assert labels["6"] == (1, None, 1, 0, None, 1)  # BIRADS 0 is a recall, not a category
    assert labels["7"] == (1, None, None, 1, 0, 0)  # blank BIRADS: unknown, not 0


def test_site_2_has_no_label_that_tells_it_from_site_1(root):
    rows = by_image(root)
    for image in ("1", "2", "9"):  # 9 has BIRADS 2 and density A in its cells
        assert rows[image].site == "site 2"
        for name in ("label_birads", "label_density", "label_recall"):
            assert rows[image].labels[name] is None
    for name in ("label_birads", "label_density", "label_recall"):
        assert "site 1 only" in rsna.LABELS[name]["rule"]


def test_meanings_and_terms(root):
    listing = rsna.list_files([root])
    assert {name for row in listing.rows for name in row.labels} == set(listing.labels)
    assert {meaning["level"] for meaning in listing.labels.values()} == {"breast"}
    assert "non-commercial" in listing.terms


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("1,10011,3", "3,10011,3", "train.csv line 4, site_id: 3, expected one of 1, 2 or blank"),
        (",0,0,0,1.0,", ",0,0,0,4,", "line 4, BIRADS: 4, expected a whole number from 0 to 2"),
        (",1.0,0,C,", ",1.0,0,3,", "line 4, density: 3, expected one of A, B, C, D"),
        ("21,True", "21,maybe", "line 7, difficult_negative_case: maybe, expected one of"),
        ("L,CC", "left,CC", "line 2, laterality: left, expected one of L, R"),
        (",AT,", ",axillary,", "line 6, view: axillary, expected one of CC, MLO"),
        ("BIRADS", "birads", "train.csv: expected a column BIRADS, found"),
    ],
)
def test_bad_tables(root, old, new, expected):
    replace_in(root, old, new)
    with pytest.raises(UserError, match=expected):
        rsna.list_files([root])


def test_a_missing_table(root):
    (root / "train.csv").unlink()
    with pytest.raises(UserError, match=r"holds no train\.csv"):
        rsna.list_files([root])
