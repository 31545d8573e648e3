import dataclasses
import json

import pytest

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import __main__ as evaluate
from mammodino_jax.evaluate import benchmarks
from mammodino_jax.provenance import hashes


@pytest.fixture
def run(monkeypatch, encoder, data, tmp_path):
    """Run the command on encoders called by name; returns results.json."""

    def run(*arguments, encoders=("tiny",), data=data, benchmark="phantom", **changes):
        def load(name):
            return dataclasses.replace(encoder, name=name, **changes)

        monkeypatch.setattr("mammodino_jax.encoder.load_encoder", load)
        output = tmp_path / "results"
        where = ["--data", str(data), "--benchmark", benchmark, "--output", str(output)]
        where += ["--cache", str(tmp_path / "cache")]
        evaluate.main(["--encoder", *encoders, *where, "--draws", "1000", *arguments])
        return json.loads((output / "results.json").read_text())

    run.output = tmp_path / "results"
    return run


def test_the_table_has_all_baselines_and_the_truth_of_the_data(run, capsys):
    results = run("--folds", "4")
    assert [t["task"] for t in results["tasks"]] == ["density", "cancer", "lesion", "density, DBT volumes"]
    density = results["tasks"][0]
    assert (density["test_items"], density["test_patients"], density["classes"]) == (40, 20, [0, 1, 2, 3])
    assert results["tasks"][3]["test_items"] == 20  # volumes, not slices, and never among 2D images
    rows = [(r["features"], r["probe"]) for r in density["rows"]]
    named = ("mask geometry", "hand-made", "raw pixels", "random init", "tiny")
    assert rows == [("majority class", "none"), *((f, p) for f in named for p in ("kNN", "linear"))]
    scores = {(r["features"], r["probe"]): r for r in density["rows"]}
    assert auc(scores["hand-made", "linear"]) > 0.9  # density is the grey level here
    assert auc(scores["mask geometry", "linear"]) < 0.7  # and not in the outline
    assert auc(scores["majority class", "none"]) == 0.5
    assert scores["tiny", "kNN"]["long_side"] == 56
    assert scores["tiny", "kNN"]["mm_per_px"] == pytest.approx(0.2 * 70 / 56)
    assert "pretraining patients unknown" in scores["tiny", "kNN"]["remarks"]
    table = (run.output / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| hand-made | linear | 56 px, 0.25 mm/px |" in table
    assert results["versions"].keys() >= {"jax", "scikit-learn", "mammodino_jax"}
    assert (run.output / "page.html").is_file()


def auc(row: dict) -> float:
    return row["metrics"]["auc"]["value"]


def test_a_second_run_takes_features_and_scores_from_the_cache(run, monkeypatch):
    first = run("--folds", "4")
    monkeypatch.setattr("mammodino_jax.evaluate.features._extract", None)
    monkeypatch.setattr("mammodino_jax.evaluate.probes.LogisticRegression", None)
    assert run("--folds", "4") == first


def test_repeats_are_drawn_anew_and_counted(run):
    task = run("--folds", "4", "--repeats", "2", "--probes", "linear")["tasks"][1]
    assert (task["folds"], task["repeats"], task["test_items"]) == (4, 2, 40)
    assert all(row["metrics"]["auc"]["seed_std"] is not None for row in task["rows"])
    with pytest.raises(UserError, match="--repeats is of a cross-validation"):
        run("--repeats", "2")


def test_a_resolution_sweep_has_rows_of_each_size(run):
    rows = run("--folds", "4", "--long-side", "28", "56", "--probes", "linear")["tasks"][0]["rows"]
    names = [r["features"] for r in rows if r["kind"] in ("random", "")]
    assert names == ["random init @ 28", "tiny @ 28", "random init @ 56", "tiny @ 56"]
    assert {r["long_side"] for r in rows} == {None, 28, 56}


def test_few_label_curves_rise_to_the_full_score(run):
    task = run("--folds", "4", "--few-labels", "--probes", "linear")["tasks"][0]
    curve = task["few_label"]["hand-made"]["linear"]
    assert [point["share"] for point in curve] == [0.01, 0.05, 0.1, 1.0]
    row = next(r for r in task["rows"] if r["features"] == "hand-made")
    assert curve[-1]["auc"] == auc(row) > curve[0]["auc"]
    assert curve[0]["patients"] < curve[-1]["patients"] == 15


def test_any_labels_can_be_asked_for(run, labelled, tmp_path):
    content = labelled.items(20)
    for _, row in content:
        row["label_own"] = int(row["patient_id"] in {f"p{i}" for i in range(0, 20, 3)})
    results = run(
        "--folds", "4", "--probes", "kNN", benchmark="labels", data=labelled.write(tmp_path / "own", content)
    )
    asked = [t["task"] for t in results["tasks"]]
    assert asked == [
        f"{label}, {kind}" for label in ("cancer", "density", "lesion", "own") for kind in ("2d", "dbt")
    ]


def test_breasts_and_exams_are_items_where_a_task_asks_them(run, monkeypatch):
    benchmark = benchmarks.BENCHMARKS["phantom"]
    tasks = tuple(dataclasses.replace(benchmark.tasks[0], level=level) for level in ("breast", "exam"))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "phantom", dataclasses.replace(benchmark, tasks=tasks))
    found = run("--folds", "4", "--probes", "linear")["tasks"]
    assert [t["test_items"] for t in found] == [20, 20]
    assert [t["level"] for t in found] == ["breast", "exam"]


def test_an_encoder_reads_the_build_it_was_made_for(run, labelled, tmp_path):
    main = labelled.write(
        tmp_path / "main", labelled.items(20), settings={"preset": "mammodino", "window": "percentile"}
    )
    raw = labelled.write(
        tmp_path / "raw", labelled.items(20)[::-1], settings={"preset": "raw", "window": "minmax"}
    )
    made = {"preset": "raw", "window": "minmax"}
    with pytest.raises(
        UserError, match=r"tiny was made for another build.*window percentile, not minmax.*--preset raw"
    ):
        run("--folds", "4", data=main, made_for=made)
    rows = run("--folds", "4", "--foreign-preprocessing", data=main, made_for=made)["tasks"][0]["rows"]
    assert "foreign preprocessing: window percentile, not minmax" in rows[-1]["remarks"]
    results = run("--folds", "4", "--builds", str(raw), data=main, made_for=made)
    assert results["encoders"]["tiny"]["reads"] == [str(raw)]
    assert results["encoders"]["tiny"]["remarks"] == ["pretraining patients unknown"]
    ours = run(
        "--folds", "4", "--builds", str(raw), data=main, made_for={"window": "percentile"}, kind="workdir"
    )
    assert ours["encoders"]["tiny"]["reads"] == [str(main)]
    assert ours["encoders"]["tiny on raw"]["reads"] == [str(raw)]
    assert "foreign preprocessing: raw" in ours["encoders"]["tiny on raw"]["remarks"]
    assert all(r["remarks"] == [] for r in ours["tasks"][0]["rows"] if r["kind"] == "baseline")
    with pytest.raises(UserError, match="100 of the 100 records of --data are not there"):
        other = [(image, row | {"image_id": f"x{row['image_id']}"}) for image, row in labelled.items(20)]
        run(
            "--folds",
            "4",
            "--builds",
            str(labelled.write(tmp_path / "other", other, settings={"preset": "raw"})),
            data=main,
        )


@pytest.mark.slow
def test_patch_tokens_and_the_whole_network_can_be_probed(run):
    task = run("--probes", "attentive,finetune,linear")["tasks"][0]
    by_name = {}
    for row in task["rows"]:
        by_name.setdefault(row["features"], []).append(row["probe"])
    assert by_name["hand-made"] == ["linear"]
    assert by_name["random init"] == by_name["tiny"] == ["attentive", "finetune", "linear"]
    assert all(auc(row) > 0.6 for row in task["rows"] if row["probe"] in ("finetune", "attentive"))


def test_weights_of_others_are_called_layout_tested(run):
    remarks = run("--folds", "4", kind="biomedclip")["tasks"][0]["rows"][-1]["remarks"]
    assert "layout tested on random weights only" in remarks


def test_the_official_split_is_the_default(run):
    density = run()["tasks"][0]
    assert (density["folds"], density["train_items"], density["test_items"]) == (1, 20, 12)


def test_two_encoders_of_one_shape_and_name_share_the_random_row(run):
    rows = run("--folds", "4", encoders=("a", "a"))["tasks"][0]["rows"]
    names = list(dict.fromkeys(r["features"] for r in rows))
    baselines = ["majority class", "mask geometry", "hand-made", "raw pixels", "random init"]
    assert names == [*baselines, "a", "a'"]


def test_patients_seen_in_pretraining_are_refused(run):
    seen = {
        "patients": sorted(hashes(["p0", "p18", "p19"])),
        "pixels": [],
    }  # p0 is in train, the others in test
    with pytest.raises(UserError, match="saw 2 test patients and 0 test images"):
        run(provenance=seen)
    assert not run.output.exists()
    rows = run("--transductive", provenance=seen)["tasks"][0]["rows"]
    said = {r["features"]: r["remarks"] for r in rows}
    assert said["tiny"] == ["transductive: pretraining saw 2 test patients, 0 test images"]
    assert said["random init"] == []
    assert "transductive" in (run.output / "table.md").read_text()


def test_pixels_seen_in_pretraining_are_refused_too(run):
    with pytest.raises(UserError, match="saw 0 test patients and 1 test images"):
        run(provenance={"patients": sorted(hashes(["p0"])), "pixels": sorted(hashes(["h-p19-CC"]))})


def test_patients_seen_only_for_training_the_probe_are_fine(run):
    rows = run(provenance={"patients": sorted(hashes(["p0", "p1"])), "pixels": []})["tasks"][0]["rows"]
    assert rows[-1]["remarks"] == []


def test_a_patient_in_two_splits_is_refused(run, labelled, tmp_path):
    content = labelled.items(10, slices=0)
    content[0][1]["split"] = "test"
    with pytest.raises(UserError, match="1 of 10 patients are in more than one split"):
        run(data=labelled.write(tmp_path / "leak", content))


def test_bad_questions_are_user_errors(run, labelled, tmp_path):
    with pytest.raises(UserError, match=r'unknown benchmark "fantom".*Did you mean "phantom"'):
        run(benchmark="fantom")
    content = labelled.items(10, slices=0)
    for _, row in content:
        del row["label_cancer"]
    with pytest.raises(UserError, match='needs the label "cancer"; labels there are: density, lesion'):
        run(data=labelled.write(tmp_path / "unlabelled", content))
    for _, row in content:
        row["label_cancer"] = 0
    with pytest.raises(UserError, match='label "cancer" has 1 known values'):
        run(data=labelled.write(tmp_path / "one", content))
    with pytest.raises(UserError, match="does not exist"):
        run(data=tmp_path / "nowhere")
    with pytest.raises(UserError, match="--draws 10 is too few"):
        run("--draws", "10")
    for _, row in content:
        row["label_cancer"] = int(row["split"] != "test" and row["patient_id"] in ("p0", "p1", "p6"))
    with pytest.raises(UserError, match='the test split has one value of label "cancer" only; use --folds 5'):
        run(data=labelled.write(tmp_path / "single", content))
    assert not run.output.exists()


def test_volumes_that_are_not_there_are_named_not_faked(run, labelled, tmp_path):
    results = run("--folds", "4", data=labelled.write(tmp_path / "flat", labelled.items(16, slices=0)))
    assert results["absent_tasks"] == ["density, DBT volumes"]
    assert (
        "Not asked, no such images in the data: density, DBT volumes."
        in (run.output / "table.md").read_text()
    )


def test_a_fold_without_positives_is_counted(run, labelled, tmp_path):
    content = labelled.items(20, slices=0)
    for _, row in content:
        row["label_cancer"] = int(row["patient_id"] in ("p0", "p1"))
    cancer = run("--folds", "5", data=labelled.write(tmp_path / "rare", content))["tasks"][1]
    for row in cancer["rows"]:
        assert row["not_computed"] >= 3
        assert row["metrics"]["auc"]["folds"].count(None) == row["not_computed"]
    assert cancer["test_items_by_class"] == {"0": 36, "1": 4}
