"""mini-MIAS: the table inside Info.txt, y from the bottom, pairs of films."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.sources import mias
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_b", Path(__file__).with_name("trees_b.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture(scope="module")
def tree(tmp_path_factory, breast) -> Path:
    return trees.make_mias(tmp_path_factory.mktemp("mias"), breast)


@pytest.fixture
def root(tmp_path) -> Path:
    """A tree of Info.txt alone, for errors."""
    (tmp_path / "Info.txt").write_text(trees.INFO)
    return tmp_path


def test_films_patients_and_sides(tree):
    rows = mias.list_files([tree]).rows
    assert [row.path.stem for row in rows] == [f"mdb00{n}" for n in range(1, 10)]
    assert [row.patient for row in rows] == [
        "P001",
        "P001",
        "P002",
        "P002",
        "P003",
        "P003",
        "P004",
        "P004",
        "P005",
    ]
    assert [row.laterality for row in rows] == list("RLRLRLRLR")  # even numbers are left
    assert {(row.view, row.kind, row.pixel_mm, row.split) for row in rows} == {("MLO", "film", 0.2, None)}
    assert [row.path.is_file() for row in rows] == [True] * 8 + [False]
    assert rows[7].labels == {} and rows[7].findings == []  # in no line


def test_labels_are_the_maximum_of_the_lines(tree):
    listing = mias.list_files([tree])
    names = ("fgd", "cancer_biopsy", "lesion", "mass", "calcification")
    labels = [tuple(row.labels.get(f"label_{k}") for k in names) for row in listing.rows]
    assert labels == [
        (1, 0, 1, 1, 0),
        (1, 0, 1, 1, 0),
        (2, 0, 0, 0, 0),
        (2, 0, 0, 0, 0),
        (0, 1, 1, 1, 0),  # CIRC B and SPIC M
        (0, 1, 1, 0, 1),
        (1, 0, 1, 1, 0),
        (None,) * 5,
        (0, 0, 1, 0, 0),
    ]
    assert set(listing.labels) == {f"label_{name}" for name in names}


def test_circles_with_y_from_the_top(tree):
    rows = mias.list_files([tree]).rows
    (big,) = rows[0].findings
    # Centre (535, 599) from the top, radius 197: checked by eye against the lesions of real films
    assert [big[k] for k in ("y0", "x0", "y1", "x1")] == [599 - 197, 535 - 197, 599 + 197, 535 + 197]
    assert big["shape"] == "circle" and big["pathology"] == "benign" and big["category"] == "mass"
    assert [f["pathology"] for f in rows[4].findings] == ["benign", "malignant"]
    for row in rows[5:7]:  # *NOTE 3*, and a line that ends after the severity
        assert len(row.findings) == 1 and row.findings[0]["y0"] is None and row.findings[0]["shape"] is None
    assert rows[2].findings == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("mdb003 D NORM", "mdb003 E NORM", "Info.txt line 7, tissue: E, expected one of F, G, D"),
        ("CIRC B 535", "CIRCLE B 535", "line 5, abnormality: CIRCLE, expected one of"),
        ("CIRC B 535 425 197", "CIRC X 535 425 197", "line 5, severity: X"),
        ("535 425 197", "535 425", "line 5: expected x, y and radius, found 535 425"),
        ("535 425 197", "535 425 wide", "line 5, x, y or radius: wide, expected a number"),
        ("mdb007 G CIRC B", "mdb007 G CIRC", "line 12: expected film, tissue, abnormality, and severity"),
        ("mdb", "film", "expected lines like mdb001"),
    ],
)
def test_bad_info(root, old, new, expected):
    (root / "Info.txt").write_text(trees.INFO.replace(old, new))
    with pytest.raises(UserError, match=expected):
        mias.list_files([root])


def test_missing_info(tmp_path):
    with pytest.raises(UserError, match=r"holds no Info\.txt"):
        mias.list_files([tmp_path])
