import importlib.util
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammodino_jax import charts, report
from mammodino_jax.errors import UserError

SECTIONS = (
    "What was run",
    "Images as training reads them",
    "First training batch",
    "How training went",
    "Warnings",
    "Where the crops fell",
    "What the patch tokens see",
    "What the features can do",
    "Where it lies",
)


def labelled():
    path = Path(__file__).parent / "evaluate/make_labelled.py"
    spec = importlib.util.spec_from_file_location("make_labelled", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics_row(step):
    falling = math.exp(-step / 20)
    row = {"step": step, "dino_global": 1 + falling, "dino_local": 4 + falling, "ibot": 3 + falling}
    row |= {"koleo": 2.0, "adjacent": 5.0, "teacher_entropy": 0.4 + step / 100, "teacher_entropy_patch": 0.5}
    row |= {"lr": 1e-3, "bad": 0.0, "time/images_per_s": 12.5, "data/mask_coverage": 0.97}
    row |= {"data/plain_mask_coverage": 0.612, "data/masked_share": 0.3, "data/global_would_reject": 0.234}
    return row | {"data/global_coverage": 0.876, "data/global_fallback": 0.0, "data/global_mm_per_px": 0.42}


def result_row(features, probe, auc, remarks=()):
    known = (
        {"low": 0.4, "high": 0.95, "seed_std": None}
        if auc is not None
        else {"low": None, "high": None, "seed_std": None}
    )
    row = {"features": features, "probe": probe, "long_side": 56, "mm_per_px": 0.25, "remarks": list(remarks)}
    row["encoder"] = features if "run" in features else None
    metrics = {"auc": {"value": auc, **known}, "balanced_accuracy": {"value": 0.61, "low": 0.5, "high": 0.7}}
    return row | {"metrics": metrics, "not_computed": 0 if auc is not None else 2}


def evaluation():
    rows = [result_row("majority class", "none", 0.5)]
    for name in ("hand-made", "random init", "<b>run</b>"):
        rows += [result_row(name, "kNN", 0.7123), result_row(name, "linear", 0.8, ["transductive"])]
    rows[-1] = result_row("<b>run</b>", "linear", None)
    facts = {"test_items": 12, "test_patients": 6, "test_items_by_class": {"A": 5, "B": 7}}
    tasks = [{"task": "density", **facts, "rows": rows}, {"task": "cancer", **facts, "rows": rows}]
    settings = {"folds": 5, "draws": 2000}
    return {"title": "Synthetic", "note": "Simulated breasts only.", "settings": settings, "tasks": tasks}


@pytest.fixture
def finished(tmp_path):
    """What a finished run left behind: arguments of report.build without the encoder."""
    module = labelled()
    data = module.write(tmp_path / "data", module.items(8))
    workdir, results, export = (tmp_path / name for name in ("run", "results", "export"))
    for folder in (workdir / "samples", workdir / "checkpoints/40", results, export):
        folder.mkdir(parents=True)
    config = {"seed": 3, "steps": 40, "batch_size": 16, "dbt_rows": 4}
    config["crops"] = {"global_size": 28, "local_size": 14}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(metrics_row(s)) + "\n" for s in range(40)))
    for name in ("crops", "pairs"):
        cv2.imwrite(str(workdir / f"samples/{name}.png"), np.full((20, 30, 3), 99, np.uint8))
    (results / "results.json").write_text(json.dumps(evaluation()))
    output = tmp_path / "out/report.html"
    return {"workdir": workdir, "data": data, "results": results, "export": export, "output": output}


@pytest.fixture(scope="module")
def encoder():
    from mammodino_jax.encoder import Encoder
    from mammodino_jax.model.head import init_params
    from mammodino_jax.model.vit import ViTConfig

    vit = ViTConfig(dim=12, depth=1, heads=1, image_size=28)
    return Encoder("tiny", vit, init_params(vit, None, seed=1))


class Reader(HTMLParser):
    """Collects what a browser would load, and checks that tags close in order."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.open, self.tags, self.text = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text if self.open[-1:] != ["style"] else ""


def test_the_page_is_whole_and_loads_nothing(finished, encoder):
    page = report.build(encoder, **finished)
    reader = Reader(page)
    assert not reader.open
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(SECTIONS)
    assert not {"script", "link", "iframe", "b"} & set(reader.tags)
    assert len(reader.loads) == reader.tags.count("img") >= 6 + 2 + 6 + 2
    assert all(load.startswith("data:image/") for load in reader.loads)
    assert not re.search(r"https?:|url\(|@import", page)
    assert str(finished["data"]) not in page  # places are relative: the page can be shared
    for place in ("../run/checkpoints/40", "../export", "../results/results.json"):
        assert place in reader.text


def test_the_page_tells_the_figures(finished, encoder):
    text = Reader(report.build(encoder, **finished)).text
    assert "Simulated breasts only." in text
    assert "independent, unofficial" in text
    assert "40 of 40" in text
    first, last = (8 + 3 * np.exp(-np.arange(s, s + 4) / 20).mean() for s in (0, 36))
    assert f"{first:.2f} → {last:.2f}" in text  # DINO + iBOT, first and last tenth of the steps
    assert "0.40 to 0.79" in text
    assert "87.6 %" in text
    assert "23.4 %" in text
    assert "0.712 [0.400, 0.950]" in text
    assert "not computed" in text
    assert "12 test items (5 A, 7 B) of 6 patients" in text
    assert "<b>run</b>" in text  # escaped in the page
    assert "DBT slices (of 8 volumes)" in text


def test_tenths_are_means_of_sums():
    rows = [{"step": s, "a": float(s), "b": 1.0} for s in range(40)]
    assert report.tenths(rows, ("a", "b")) == (1.5 + 1, 37.5 + 1)


def test_findings_are_boxed_in_record_pixels():
    picture = report.Picture(np.full((100, 60), 50, np.uint8), {})
    box = {"record_x0": 20, "record_y0": 30, "record_x1": 40, "record_y1": 50}
    drawn = report.outlined(picture, [box], height=200)
    orange = np.argwhere((drawn == report.BOX).all(axis=-1))
    assert orange.min(axis=0).tolist() == [56, 36]  # twice the record, 4 pixels outside the box
    assert orange.max(axis=0).tolist() == [104, 84]
    nowhere = dict.fromkeys(box)
    assert not (report.outlined(picture, [nowhere], height=200) == report.BOX).all(axis=-1).any()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("run/metrics.jsonl", "metrics.jsonl does not exist; train first"),
        ("run/config.json", "config.json does not exist"),
        ("run/samples/crops.png", "crops.png does not exist"),
        ("results/results.json", "results.json does not exist; run first: python -m mammodino_jax.evaluate"),
        ("data/prep.json", "not a built data set"),
    ],
)
def test_what_is_missing_is_named(finished, missing, message):
    (finished["workdir"].parent / missing).unlink()
    with pytest.raises(UserError, match=re.escape(message)):
        report.main([part for name, path in finished.items() for part in (f"--{name}", str(path))])
    assert not finished["output"].exists()


def test_empty_metrics_are_a_user_error(finished):
    (finished["workdir"] / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows"):
        report.read_inputs(*(finished[k] for k in ("workdir", "data", "results", "export")))


def test_the_command_writes_the_page(monkeypatch, finished, encoder, capsys):
    monkeypatch.setattr("mammodino_jax.encoder.load_encoder", lambda name: encoder)
    report.main([part for name, path in finished.items() for part in (f"--{name}", str(path))])
    assert finished["output"].read_text().startswith("<!doctype html>")
    assert str(finished["output"]) in capsys.readouterr().out


def test_warnings_are_listed_with_what_to_try():
    none = [{"step": s} for s in range(5)]
    assert "None: no signature" in report.warnings_section(none)
    rows = [{"step": s, **({"warning/mask_failure": 1.0} if 3 <= s < 9 else {})} for s in range(20)]
    rows[1]["warning/not_finite"] = 1.0
    told = report.warnings_section(rows)
    assert "<td>mask_failure</td><td>3</td><td>8</td>" in told and "another --mask" in told
    assert told.index("not_finite") < told.index("mask_failure")


def test_charts_leave_out_what_was_not_logged():
    rows = [{"step": s, "dino_global": 1.0, "lr": 0.1} for s in range(3)]
    assert b"<svg" in charts.training(rows)
    steps, values = charts.series([{"step": 0, "a": 1.0}, {"step": 5}, {"step": 9, "a": 2.0}], "a")
    assert (steps.tolist(), values.tolist()) == ([0, 9], [1, 2])
