import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from mammodino_jax import compare
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import __main__ as evaluate
from mammodino_jax.evaluate.metrics import Scored, summarise
from mammodino_jax.evaluate.scores import read_scores, write_scores
from mammodino_jax.provenance import hashes


def folds(classes=2, count=2, repeats=2, seed=0):
    rng, out = np.random.default_rng(seed), []
    for repeat in range(repeats):
        for part in np.array_split(rng.permutation(20), count):
            score = rng.random((len(part), classes))
            patient = np.array([f"patient {i // 2}" for i in part], object)
            item = np.array([f"image {i:02}" for i in part], object)
            out.append(Scored(patient, part % classes, score, score.argmax(axis=1), item, repeat))
    return out


def test_scores_come_back_by_row_with_their_folds_and_repeats(tmp_path):
    rows = [
        ("density", "hand-made", "kNN", folds(4)),
        ("density", "hand-made", "linear", folds(4, seed=1)),
        ("cancer", "majority class", "none", folds(2, count=1, repeats=1)),
    ]
    write_scores(tmp_path / "scores.parquet", rows)
    found = read_scores(tmp_path / "scores.parquet")
    assert list(found) == [row[:3] for row in rows]
    for *key, wrote in rows:
        read = found[tuple(key)]
        assert [f.repeat for f in read] == [f.repeat for f in wrote]
        for f, g in zip(read, wrote, strict=True):
            order = np.argsort(g.item)
            np.testing.assert_array_equal(f.item, g.item[order])
            np.testing.assert_array_equal(f.label, g.label[order])
            np.testing.assert_array_equal(f.predicted, g.predicted[order])
            np.testing.assert_allclose(f.score, g.score[order], atol=1e-7)
            assert set(f.patient) == hashes(g.patient)
        auc, again = (summarise(fs, 1000, 0, ("auc",))["auc"] for fs in (wrote, read))
        assert again["value"] == pytest.approx(auc["value"], abs=1e-12)


def test_the_file_holds_no_patient_ids_and_a_line_an_item_fold_and_repeat(tmp_path):
    write_scores(tmp_path / "scores.parquet", [("cancer", "x", "linear", folds())])
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(table) == 40
    assert {(r["repeat"], r["fold"]) for r in table} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert b"patient 1" not in (tmp_path / "scores.parquet").read_bytes()
    assert not any("patient" in r["patient"] for r in table)


def test_scores_that_are_not_computed_stay_so(tmp_path):
    fold = folds(3, count=1, repeats=1)[0]
    fold.score[:, 2] = np.nan
    write_scores(tmp_path / "scores.parquet", [("t", "x", "linear", [fold])])
    read = read_scores(tmp_path / "scores.parquet")["t", "x", "linear"][0]
    assert np.isnan(read.score[:, 2]).all() and np.isfinite(read.score[:, :2]).all()


def test_what_is_no_score_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist; run first"):
        read_scores(tmp_path / "scores.parquet")
    (tmp_path / "bad.parquet").write_text("scores")
    with pytest.raises(UserError, match="is no score file"):
        read_scores(tmp_path / "bad.parquet")
    pq.write_table(pq.read_table(write(tmp_path)).select(["task", "item"]), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="is no score file"):
        read_scores(tmp_path / "other.parquet")


def test_what_evaluate_writes_is_compared(monkeypatch, encoder, data, tmp_path):
    for name, changes in (("one", {}), ("two", {"mean": (0.2,)})):
        loaded = dataclasses.replace(encoder, name=f"encoder {name}", **changes)
        monkeypatch.setattr("mammodino_jax.encoder.load_encoder", lambda spec, loaded=loaded: loaded)
        evaluate.main([
            "--encoder", name, "--data", str(data), "--benchmark", "phantom", "--folds", "4", "--draws", "1000",
            "--output", str(tmp_path / name), "--cache", str(tmp_path / "cache"), "--probes", "kNN",
        ])  # fmt: skip
    results = json.loads((tmp_path / "one/results.json").read_text())
    scores = read_scores(tmp_path / "one/scores.parquet")
    for task in results["tasks"]:
        for row in task["rows"]:
            again = summarise(scores[task["task"], row["features"], row["probe"]], 1000, 0, ("auc",))["auc"]
            assert again["value"] == pytest.approx(row["metrics"]["auc"]["value"], abs=1e-6)
    compare.main(
        [*(str(tmp_path / n) for n in ("one", "two")), "--output", str(tmp_path / "both"), "--probe", "kNN"]
    )
    found = json.loads((tmp_path / "both/compare.json").read_text())
    assert found["reference"] == "encoder one"
    names = [s["system"] for s in found["systems"]]
    assert names.count("majority class") == 1 and {"encoder one", "encoder two"} < set(names)
    assert found["comparisons"] == len(found["tasks"]) * (len(names) - 1)


def write(folder):
    write_scores(folder / "good.parquet", [("t", "x", "linear", folds())])
    return folder / "good.parquet"
