import json

import numpy as np
import pytest
from test_report import Reader

from mammodino_jax import compare
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.metrics import Scored, summarise
from mammodino_jax.evaluate.scores import write_scores

BASELINES = {"majority class": 0.0, "hand-made": 1.0}
PATIENTS = 120


def scored(task, name, strength, folds, repeats, seed=0, items=1):
    """What a probe of a given strength says of two or three classes; the same items for every encoder."""
    classes = 3 if task == "density" else 2
    patient = np.repeat(np.arange(PATIENTS), items)
    label = patient % classes
    name_seed = sum(map(ord, name))
    out = []
    for repeat in range(repeats):
        part = np.random.default_rng([seed, repeat]).permutation(PATIENTS)[patient] % folds
        noise = np.random.default_rng([name_seed, repeat])
        score = np.zeros((len(label), classes))
        if strength:
            score = strength * np.eye(classes)[label] + noise.normal(size=score.shape)
        for number in range(folds):
            at = part == number
            item = np.array([f"i{i:03}" for i in np.flatnonzero(at)], object)
            people = np.array([f"p{p}" for p in patient[at]], object)
            out.append(Scored(people, label[at], score[at], score[at].argmax(axis=1), item, repeat))
    return out


@pytest.fixture
def write(tmp_path):
    """Write the output folder of an evaluation: encoders are {name: strength}."""

    def write(folder, encoders, folds=1, repeats=1, tasks=("cancer", "density"), benchmark="phantom", **data):
        scores, found = [], []
        for task in tasks:
            rows = []
            for name, strength in {**BASELINES, **encoders}.items():
                for probe in ("none",) if name == "majority class" else ("kNN", "linear"):
                    said = scored(
                        task, name, strength if probe != "kNN" else strength / 2, folds, repeats, **data
                    )
                    scores.append((task, name, probe, said))
                    metrics = summarise(said, 1000, 0)
                    spec = None if name in BASELINES else f"hub:{name}.pth"
                    row = {"features": name, "encoder": spec, "probe": probe, "metrics": metrics}
                    row["kind"] = "hub" if spec else "baseline"
                    row |= {"long_side": 518 if strength else None, "mm_per_px": 0.25}
                    row |= {"remarks": ["layout tested"] if "DINO" in name else [], "not_computed": 0}
                    rows.append(row)
            facts = {
                "task": task,
                "level": "image",
                "classes": [0, 1],
                "folds": folds * repeats,
                "repeats": repeats,
            }
            facts |= {"test_items": 120, "test_patients": PATIENTS, "test_items_by_class": {"0": 60, "1": 60}}
            found.append({**facts, "rows": rows, "few_label": {}})
        results = {
            "benchmark": benchmark,
            "title": "Phantoms",
            "note": "Simulated <breasts>.",
            "tasks": found,
        }
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps(results))
        write_scores(tmp_path / folder / "scores.parquet", scores)
        return tmp_path / folder

    return write


@pytest.fixture
def run(tmp_path):
    def run(*folders, arguments=()):
        output = tmp_path / "comparison"
        compare.main([*map(str, folders), "--output", str(output), *arguments])
        return json.loads((output / "compare.json").read_text())

    run.output = tmp_path / "comparison"
    return run


def test_two_results_make_one_table_with_marks(run, write, capsys):
    one = write("one", {"DINOv2 S": 1.0, "ours": 2.5})
    two = write("two", {"RAD-DINO": 1.0, "noise": 0.01})
    found = run(one, two)
    assert [s["system"] for s in found["systems"]] == [*BASELINES, "DINOv2 S", "ours", "RAD-DINO", "noise"]
    assert (found["reference"], found["comparisons"], found["draws"]) == ("DINOv2 S", 10, 10_000)
    marks = {s["system"]: [c.get("mark") for c in s["tasks"].values()] for s in found["systems"]}
    assert marks["ours"] == ["↑", "↑"]
    assert marks["noise"] == marks["majority class"] == ["↓", "↓"]
    assert marks["hand-made"] == marks["RAD-DINO"] == ["", ""]  # as strong as the reference
    assert marks["DINOv2 S"] == [None, None]
    for system in found["systems"]:
        for cell in system["tasks"].values():
            if "p" in cell:
                assert cell["p"] <= cell["p_holm"] <= 10 * cell["p"]
                inside = cell["difference_low"] < 0 < cell["difference_high"]
                assert inside == (cell["p"] >= 0.05)
                assert (cell["mark"] == "") == (cell["p_holm"] >= 0.05)
    text = (run.output / "compare.md").read_text()
    assert text in capsys.readouterr().out
    assert "| DINOv2 S (reference) |" in text
    value = found["systems"][3]["tasks"]["cancer"]
    assert (
        f"| ours | 518 px, 0.25 mm/px | {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}] ↑ |"
        in text
    )
    assert "Holm's correction over all 10 comparisons" in text
    assert "| layout tested |" in text


def test_delong_stands_beside_where_it_holds(run, write):
    found = run(write("one", {"DINOv2 S": 1.0, "ours": 2.5}))
    cells = {s["system"]: s["tasks"] for s in found["systems"]}
    assert cells["ours"]["cancer"]["delong"]["p"] < 0.01
    assert "two classes" in cells["ours"]["density"]["delong"]["refused"]
    repeated = run(write("two", {"DINOv2 S": 1.0, "ours": 2.5}, folds=3, repeats=2))
    cells = {s["system"]: s["tasks"] for s in repeated["systems"]}
    assert "needs one fold, these are 6" in cells["ours"]["cancer"]["delong"]["refused"]
    assert cells["ours"]["cancer"]["seed_std"] > 0
    assert "seeds ±" in (run.output / "compare.md").read_text()


def test_the_page_is_whole_and_loads_nothing(run, write):
    run(write("one", {"DINOv2 S": 1.0, "<b>ours</b>": 2.5}))
    reader = Reader((run.output / "compare.html").read_text())
    assert not reader.open and not reader.loads
    assert not {"script", "link", "b", "breasts"} & set(reader.tags)
    assert "<b>ours</b>" in reader.text and "Simulated <breasts>." in reader.text
    assert "DINOv2 S (reference)" in reader.text and "↑" in reader.text


def test_the_reference_the_probe_and_the_metric_can_be_chosen(run, write):
    folder = write("one", {"first": 1.0, "ours": 2.5})
    assert run(folder)["reference"] == "first"  # no DINOv2 there
    found = run(folder, arguments=["--reference", "ours", "--probe", "kNN", "--metric", "pf1"])
    assert (found["reference"], found["probe"], found["metric"]) == ("ours", "kNN", "pf1")
    assert list(found["systems"][0]["tasks"]) == ["cancer"]  # pF1 is of two classes only
    assert "| - |" in (run.output / "compare.md").read_text()
    for arguments, message in (
        (["--reference", "our"], 'is no row. Did you mean "ours"'),
        (["--probe", "linaer"], 'has no probe "linaer" in task "cancer". Did you mean "linear"'),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, arguments=arguments)


def test_without_an_encoder_a_reference_must_be_named(run, write):
    folder = write("one", {})
    with pytest.raises(
        UserError, match="no encoder to compare with; name one by --reference: majority class"
    ):
        run(folder)
    assert run(folder, arguments=["--reference", "hand-made"])["comparisons"] == 2


def test_one_name_for_two_encoders_is_told_apart_and_equal_rows_are_one(run, write):
    one, two = write("one", {"ours": 1.0}), write("two", {"ours": 2.5})
    assert [s["system"] for s in run(one, two)["systems"]] == [*BASELINES, "ours", "ours (two)"]
    assert [s["system"] for s in run(one, one)["systems"]] == [*BASELINES, "ours"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"benchmark": "vindr"}, "their benchmarks differ: phantom and vindr"),
        ({"tasks": ("cancer",)}, "task of their tasks differs"),
        ({"folds": 3}, "folds of their tasks differs"),
        (
            {"folds": 4, "repeats": 1, "seed": 1},
            'their items of task "cancer" differ: fold 0: patients differ',
        ),
    ],
)
def test_results_that_do_not_match_are_refused_by_name(run, write, other, message):
    one = write("one", {"ours": 1.0}, folds=4 if other.get("folds") == 4 else 1)
    two = write("two", {"theirs": 1.0}, **other)
    with pytest.raises(UserError, match=message) as refused:
        run(one, two)
    assert str(one) in str(refused.value) and str(two) in str(refused.value)
    assert not run.output.exists()


def test_missing_damaged_and_old_results_are_user_errors(run, write, tmp_path):
    with pytest.raises(UserError, match=r"results.json does not exist; run first"):
        run(tmp_path)
    one, two = write("one", {"ours": 1.0}), write("two", {"theirs": 1.0})
    (one / "results.json").write_bytes((two / "results.json").read_bytes())
    with pytest.raises(UserError, match=r"scores.parquet lacks rows of .*results.json"):
        run(one)
    (two / "scores.parquet").unlink()
    with pytest.raises(UserError, match=r"scores.parquet does not exist"):
        run(two)
    for text in (json.dumps({"tasks": [{"task": "a", "rows": [{"auc": 0.5}]}]}), "{"):
        (two / "results.json").write_text(text)
        with pytest.raises(UserError, match="is damaged, or of an earlier version"):
            run(two)
