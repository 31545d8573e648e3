import dataclasses
import json

import pytest

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import __main__ as evaluate
from mammodino_jax.provenance import hashes


@pytest.fixture
def run(monkeypatch, encoder, data, tmp_path):
    """Run the command on encoders called by name; returns results.json."""

    def run(*arguments, encoders=("tiny",), data=data, provenance=None, benchmark="phantom"):
        def load(name):
            return dataclasses.replace(encoder, name=name, provenance=provenance or {})

        monkeypatch.setattr("mammodino_jax.encoder.load_encoder", load)
        output = tmp_path / "results"
        where = ["--data", str(data), "--benchmark", benchmark, "--output", str(output)]
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
    named = ("hand-made", "random init", "tiny")
    assert rows == [("majority class", "none"), *((f, p) for f in named for p in ("kNN", "linear"))]
    scores = {(r["features"], r["probe"]): r for r in density["rows"]}
    assert scores["hand-made", "linear"]["auc"] > 0.9  # density is the grey level here
    assert scores["majority class", "none"]["auc"] == 0.5
    assert scores["tiny", "kNN"]["long_side"] == 56
    assert scores["tiny", "kNN"]["mm_per_px"] == pytest.approx(0.2 * 70 / 56)
    assert scores["tiny", "kNN"]["seen"] == "unknown"
    table = (run.output / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| hand-made | linear | 56 px, 0.25 mm/px |" in table
    assert results["versions"].keys() >= {"jax", "scikit-learn", "mammodino_jax"}


def test_the_official_split_is_the_default(run):
    density = run()["tasks"][0]
    assert (density["folds"], density["train_items"], density["test_items"]) == (1, 20, 12)


def test_two_encoders_of_one_shape_and_name_share_the_random_row(run):
    rows = run("--folds", "4", encoders=("a", "a"))["tasks"][0]["rows"]
    names = list(dict.fromkeys(r["features"] for r in rows))
    assert names == ["majority class", "hand-made", "random init", "a", "a'"]


def test_patients_seen_in_pretraining_are_refused(run):
    seen = {
        "patients": sorted(hashes(["p0", "p18", "p19"])),
        "pixels": [],
    }  # p0 is in train, the others in test
    with pytest.raises(UserError, match="saw 2 test patients and 0 test images"):
        run(provenance=seen)
    assert not run.output.exists()
    rows = run("--transductive", provenance=seen)["tasks"][0]["rows"]
    assert {r["features"]: r["seen"] for r in rows}["tiny"] == "yes"
    assert {r["features"]: r["seen"] for r in rows}["random init"] == "no"
    assert "transductive" in (run.output / "table.md").read_text()


def test_pixels_seen_in_pretraining_are_refused_too(run):
    with pytest.raises(UserError, match="saw 0 test patients and 1 test images"):
        run(provenance={"patients": sorted(hashes(["p0"])), "pixels": sorted(hashes(["h-p19-CC"]))})


def test_patients_seen_only_for_training_the_probe_are_fine(run):
    rows = run(provenance={"patients": sorted(hashes(["p0", "p1"])), "pixels": []})["tasks"][0]["rows"]
    assert rows[-1]["seen"] == "no"


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
        assert row["fold_auc"].count(None) == row["not_computed"]
    assert cancer["test_items_by_class"] == {"0": 36, "1": 4}
