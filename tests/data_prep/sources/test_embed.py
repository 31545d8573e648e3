"""EMBED: findings joined to files by exam and side, follow-up of screening exams, image types."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.sources import embed
from mammodino_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("trees_a", Path(__file__).with_name("trees_a.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture
def root(tmp_path, breast, write_dicom) -> Path:
    return trees.make_embed(tmp_path, breast, write_dicom)


LATER = "101,2,2015-02-01,MG Diagnostic Left,3.0,P,L,4.0,L"  # a line that tells nothing of the right breast


def by_file(root: Path) -> dict:
    return {row.path.stem: row for row in embed.list_files([root]).rows}


def label(rows: dict, name: str) -> dict:
    return {file: row.labels.get(f"label_{name}") for file, row in rows.items()}


def replace_in(root: Path, name: str, old: str, new: str) -> None:
    table = root / "tables" / f"EMBED_OpenData_{name}.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))


def test_files(root):
    rows = by_file(root)
    assert "".join(rows) == "abcdefghijklmnopqrz"
    assert [file for file, row in rows.items() if not row.path.is_file()] == ["q"]
    assert rows["a"].name == "images/cohort_1/101/1/a.dcm"  # whatever the prefix in the table
    assert rows["o"].name == "images/104/8/o.dcm"  # no cohort in its path
    assert rows["q"].name == "104/9/q.dcm"
    assert (rows["a"].patient, rows["a"].study) == ("101", "1")  # 101.0 in the table
    assert rows["j"].view == "XCCL" and (rows["r"].laterality, rows["r"].view) == (None, None)
    assert {row.split for row in rows.values()} == {None}
    assert (rows["z"].patient, rows["z"].labels) == ("101", {})  # in no table


def test_image_types(root):
    rows = by_file(root)
    assert [rows[file].kind for file in "achq"] == [None, "synthetic2d", "synthetic2d", "dbt"]
    rejected = {file: row.reject[0] for file, row in rows.items() if row.reject}
    assert rejected == {"d": "spot_mag", "e": "secondary_capture"}
    replace_in(root, "metadata", "ROI_SSC", "roi_ss")
    assert by_file(root)["e"].reject[0] == "secondary_capture"


def test_the_full_tables_are_preferred(root):
    for name in ("clinical", "metadata"):
        (root / "tables" / f"EMBED_OpenData_{name}.csv").unlink()
    rows = embed.list_files([root]).rows
    assert [row.path.stem for row in rows if row.study] == ["a", "b"]  # what the reduced table has
    assert rows[0].labels["label_recall"] == 1


def test_density_is_of_the_exam(root):
    density = label(by_file(root), "density")
    assert [density[file] for file in "abdf"] == [1, 1, 2, 2]  # f: of a breast without a line
    assert density["l"] is None  # 5: male
    assert density["n"] is None  # blank
    assert density["r"] == 0  # of a file without a side


def test_birads_is_the_worst_of_the_breast(root):
    rows = by_file(root)
    birads, recall = label(rows, "birads"), label(rows, "recall")
    assert (birads["a"], recall["a"]) == (None, 1)  # A is a recall
    assert (birads["b"], recall["b"]) == (0, 0)  # not that of the left breast
    assert (birads["d"], recall["d"]) == (3, None)  # S and P
    assert (birads["f"], recall["f"]) == (None, None)  # no line of the right breast in that exam
    assert birads["g"] == birads["h"] == birads["i"] == 0  # blank and B are of both breasts
    assert birads["l"] == 2  # B and P
    assert (birads["m"], recall["m"]) == (None, None)  # K, beside N
    assert (birads["n"], recall["n"]) == (None, 1)  # A beside B
    assert label(rows, "suspicious_birads45") == {
        file: None if value is None else int(value >= 3) for file, value in birads.items()
    }
    assert [label(rows, "suspicious_birads5")[file] for file in "dj"] == [0, 1]


def test_cancer_by_pathology_of_the_exam(root):
    cancer = label(by_file(root), "cancer_biopsy")
    assert cancer["d"] == 1  # 0.0 is invasive, beside a benign result
    assert cancer["j"] == 1  # in situ
    assert cancer["k"] is None  # the finding is of both breasts, the biopsy of the right one
    assert cancer["l"] is None  # 6 says nothing
    assert cancer["q"] == 0  # borderline
    assert cancer["f"] is None and cancer["r"] is None


def test_cancer_of_screening_exams_by_follow_up(root):
    cancer = label(by_file(root), "cancer_biopsy")
    assert cancer["a"] == cancer["c"] == 1  # recalled, cancer after 3 weeks
    assert cancer["b"] == 0  # the other breast: negative, and again after 13 months
    assert cancer["g"] is None  # negative, but nothing later
    assert cancer["h"] == 1  # interval cancer
    assert cancer["i"] is None  # its other breast
    assert cancer["n"] is None  # recalled, nothing later
    assert cancer["o"] is None  # a cancer after 17 months, before the next negative screening
    assert cancer["p"] == 0  # recalled, biopsied on the same day: not cancer


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("2016-02-15", "2016-01-10", 0),  # the next screening 365 days later
        ("2016-02-15", "2016-01-09", None),  # 364
        ("2016-02-15", "", None),
        ("2016-02-15,MG Screening", "2016-02-15,MG Diagnostic", None),
        ("2016-02-15,MG Screening Bilateral,2.0,N", "2016-02-15,MG Screening Bilateral,2.0,A", None),
        (LATER, "101,20,2015-06-01,MG,3,K,R,,", None),  # a known cancer between
        (LATER, "101,20,2015-06-01,MG,3,S,R,4,", 0),  # a benign biopsy
        (LATER, "101,20,2014-12-01,MG,3,M,R,0,", 0),  # a cancer before
        (LATER, "101,20,2016-01-10,MG,3,M,R,0,", 1),  # within 365 days
        (LATER, "101,20,2016-01-11,MG,3,M,R,0,", None),  # later, before the next screening
        (LATER, "101,20,2016-03-01,MG,3,M,R,0,", 0),  # after it
    ],
)
def test_edges_of_follow_up(root, old, new, expected):
    """The negative right breast of patient 101 (file b)."""
    replace_in(root, "clinical", old, new)
    assert label(by_file(root), "cancer_biopsy")["b"] == expected


def test_regions_of_interest(root):
    rows = by_file(root)
    first, second = rows["a"].findings
    assert [first[k] for k in ("y0", "x0", "y1", "x1")] == [40, 10, 80, 50]
    assert [second[k] for k in ("y0", "x0", "y1", "x1")] == [90, 5, 120, 30]
    assert first["category"] == "roi" and first["shape"] == "box"
    assert [len(rows[file].findings) for file in "bcef"] == [0, 1, 1, 0]  # e: a box that stands alone


def test_meanings_and_terms(root):
    listing = embed.list_files([root])
    assert {name for row in listing.rows for name in row.labels} == set(listing.labels)
    levels = {name: meaning["level"] for name, meaning in listing.labels.items()}
    assert (
        levels["label_density"] == "exam"
        and levels["label_birads"] == levels["label_cancer_biopsy"] == "breast"
    )
    assert listing.no_release and "no public release" in listing.terms


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("clinical", ",A,L,", ",0,L,", "clinical.csv line 2, asses: 0, expected one of A, N"),
        ("clinical", "0.0,L", "9,L", "line 4, path_severity: 9, expected a whole number from 0 to 6"),
        ("clinical", "2015-01-10", "10 Jan", "line 2, study_date_anon: 10 Jan, expected a date"),
        ("clinical", ",5.0,", ",8,", "line 9, tissueden: 8, expected a whole number from 1 to 5"),
        ("clinical", ",A,L,", ",A,left,", "line 2, side: LEFT, expected one of L, R, B"),
        ("clinical", "path_severity", "path", "expected a column path_severity, found"),
        ("metadata", "C-view", "CEM", "metadata.csv line 4, FinalImageType: cem, expected one of 2d"),
        ("metadata", '"((40, 10, 80, 50), (90', '"((40, 10, 80), (90', r"line 2, ROI_coords: .*, expected \(\(ymin"),
        ("metadata", '"[[40, 10, 80, 50]]"', "none", "line 4, ROI_coords: none, expected"),
        ("metadata", "/mnt/elsewhere/104/8/o.dcm", "o.dcm", "line 16, anon_dicom_path: o.dcm, expected patient"),
        ("metadata", "spot_mag", "spot", "expected a column spot_mag, found"),
    ],
)  # fmt: skip
def test_bad_tables(root, name, old, new, expected):
    replace_in(root, name, old, new)
    with pytest.raises(UserError, match=expected):
        embed.list_files([root])


def test_a_missing_table(root):
    for path in (root / "tables").glob("*clinical*"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"no EMBED_OpenData_clinical.csv or EMBED_OpenData_clinical_reduced.csv"
    ):
        embed.list_files([root])
