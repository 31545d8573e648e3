"""Recipes against the labels that the sources really give, and against built miniature trees of each."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data_prep import phantom
from data_prep.build import BuildOptions, build
from data_prep.sources import bcs_dbt, cbis_ddsm, cmmd, embed, inbreast, mias, rsna, vindr
from mammodino_jax.data import records
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.__main__ import main
from mammodino_jax.evaluate.benchmarks import BENCHMARKS, asked_of, find
from mammodino_jax.evaluate.items import group, read_rows
from mammodino_jax.evaluate.tasks import ask

SOURCES = {
    "vindr": vindr,
    "rsna": rsna,
    "embed": embed,
    "cbis_ddsm": cbis_ddsm,
    "inbreast": inbreast,
    "cmmd": cmmd,
    "bcs_dbt": bcs_dbt,
    "minimias": mias,
    "phantom": phantom,
}
TASKS = [(name, task) for name, benchmark in BENCHMARKS.items() for task in benchmark.tasks]
LEVELS = ("image", "breast", "exam")
# asked of single images though the label is of a breast or exam, and said so
FINER = {("rsna", "cancer, single images"), ("phantom", "density"), ("phantom", "density, DBT volumes")}
CLASSES = {  # of labels with more than two
    "birads": {"vindr": 5, "inbreast": 5, "embed": 5, "rsna": 2},
    "density": dict.fromkeys(SOURCES, 4),
    "fgd": {"minimias": 3},
}


def test_every_recipe_has_a_source():
    assert BENCHMARKS.keys() == SOURCES.keys()


@pytest.mark.parametrize(("name", "task"), TASKS, ids=lambda x: getattr(x, "name", x))
def test_the_source_gives_the_label_at_that_level_with_these_classes(name, task):
    meanings = SOURCES[name].LABELS
    for label in task.labels:
        assert f"label_{label}" in meanings
    meaning = meanings[f"label_{task.label}"]
    if (name, task.name) in FINER:
        assert task.level == "image" != meaning["level"]
    else:
        assert task.level == meaning["level"]
    assert len(meaning["classes"]) == CLASSES.get(task.label, {}).get(name, 2)
    assert set(task.kinds) <= set(records.KINDS)
    hash(task)  # tasks are keys


@pytest.mark.parametrize("name", BENCHMARKS)
def test_names_are_unique_and_columns_exist(name):
    benchmark = BENCHMARKS[name]
    names = [task.name for task in benchmark.tasks]
    assert len(set(names)) == len(names)
    assert benchmark.folds in (0, 5)
    labels = {label.removeprefix("label_") for label in SOURCES[name].LABELS}
    assert ("mass" in labels and "calcification" in labels) or "lesion_type" not in benchmark.breakdown
    special = {"resolution", "lesion_size", "lesion_type"}
    assert set(benchmark.breakdown) <= special | labels | set(records.INDEX.names)
    for task in benchmark.tasks:
        assert all(column in records.INDEX.names or column.startswith("label_") for column in task.where)


def test_a_wrong_name_is_answered_with_a_suggestion():
    assert find("vindr") is BENCHMARKS["vindr"]
    with pytest.raises(UserError, match=r'unknown benchmark "vinder".*Did you mean "vindr"'):
        find("vinder")


def _load(path: str):
    """A module of tests/data_prep (tests are not a package)."""
    path = Path(__file__).parents[1] / "data_prep" / path
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_data_prep", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_fixtures = _load("conftest.py")
breast, write_dicom = _fixtures.breast, _fixtures.write_dicom
MAKERS = vars(_load("sources/trees_a.py")) | vars(_load("sources/trees_b.py"))

# {label: items} that each task is asked of, counted by hand from the tables of the miniature trees
ASKED = {
    "vindr": {
        "suspicious, BI-RADS 4-5": {0: 3, 1: 2},
        "suspicious, BI-RADS 5": {0: 4, 1: 1},
        "lesion": {0: 4, 1: 3},
        "mass": {0: 6, 1: 1},
        "calcification": {0: 5, 1: 2},
        "BI-RADS": {0: 1, 1: 1, 2: 1, 3: 1, 4: 1},
        "density": {0: 2, 1: 1, 2: 1, 3: 1},
    },
    "rsna": {
        "cancer": {0: 5, 1: 2},  # 10011 has two images of the right breast
        "cancer, single images": {0: 6, 1: 2},
        "density": {1: 2, 2: 2},
        "recall": {0: 2, 1: 1},
        "BI-RADS 1 or 2": {0: 1, 1: 1},
    },
    "embed": {
        "cancer": {0: 2, 1: 2},
        "cancer, synthetic 2D": {1: 2},
        "suspicious, BI-RADS 4-5": {0: 5, 1: 2},
        "recall": {0: 4, 1: 3},
        "BI-RADS": {0: 3, 1: 1, 2: 1, 4: 2},
        "density": {0: 2, 1: 2, 2: 1, 3: 2},
    },
    "cbis_ddsm": {
        "cancer, masses": {0: 2, 1: 2},
        "cancer, calcifications": {0: 1, 1: 1},
        "density": {1: 1, 2: 3},
    },
    "inbreast": {
        "suspicious, BI-RADS 4-5": {0: 3, 1: 1},
        "lesion": {0: 2, 1: 3},
        "mass": {0: 4, 1: 1},
        "calcification": {0: 2, 1: 3},
        "BI-RADS": {0: 2, 1: 1, 3: 1},
        "density": {0: 1, 1: 2, 3: 1},
    },
    "cmmd": {  # every file of the tree is a study of its own
        "cancer": {0: 3, 1: 3},
        "mass": {0: 2, 1: 4},
        "calcification": {0: 2, 1: 4},
    },
    "bcs_dbt": {"lesion": {0: 2, 1: 3}, "cancer": {0: 3, 1: 1}},
    "minimias": {
        "density (fatty, glandular, dense)": {0: 2, 1: 3, 2: 2},
        "abnormality": {0: 2, 1: 5},
        "cancer among abnormalities": {0: 3, 1: 2},
    },
}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "phantom"])
def test_a_built_tree_has_items_of_every_task(name, tmp_path, breast, write_dicom):
    source = {"minimias": "mias"}.get(name, name)
    (tmp_path / source).mkdir()
    root = MAKERS[f"make_{source}"](tmp_path / source, breast, write_dicom)
    build(BuildOptions((root,), tmp_path / "out", source=source, key=str(tmp_path / "key")))
    rows = read_rows([tmp_path / "out"])
    found = {}
    for task in BENCHMARKS[name].tasks:
        items = group(rows, task.level, task.kinds)
        asked = asked_of(task, rows, items)
        labels, counts = np.unique(items.label(task.label)[asked], return_counts=True)
        found[task.name] = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    assert found == ASKED[name]


def test_what_a_recipe_cannot_be_asked_of_is_refused(labelled, tmp_path):
    content = labelled.items(8, slices=0)
    for _, row in content:
        row |= {"kind": "film", "label_cancer_biopsy": row["label_cancer"]}
    rows = read_rows([labelled.write(tmp_path / "films", content)])
    with pytest.raises(
        UserError, match='task "cancer, masses" needs the label "mass"; labels there are: cancer'
    ):
        ask(BENCHMARKS["cbis_ddsm"], rows, 0, 1, 0)
    with pytest.raises(UserError, match="--dense: the findings of CMMD have no places"):
        main(["--encoder", "e", "--data", "d", "--output", "o", "--benchmark", "cmmd", "--dense"])
