"""Benchmarks: which labels of a built data set are asked of the features, over which images.

The splits are the data set's official ones where it has them. Else patients are cross-validated in folds, or,
where one split is large enough, drawn by the seed of the build. Whatever is chosen (the L2 of a probe, an
epoch) is chosen on validation patients, never on the test. Labels and their rules: data_prep/sources/.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mammodino_jax.errors import UserError, suggest
from mammodino_jax.evaluate.breakdown import common


@dataclasses.dataclass(frozen=True)
class Task:
    """A question.

    Attributes:
      label: index column label_<label>.
      kinds: the records that it is asked of.
      level: what an item is: "image" (a tomosynthesis volume counts as one), "breast" or "exam".
      where: {index column: the values that an item may have}; label columns have whole numbers.
      note: what a reader must know of this task alone.
    """

    name: str
    label: str
    kinds: tuple[str, ...] = ("2d",)
    level: str = "image"
    where: Mapping[str, tuple] = dataclasses.field(default_factory=dict, hash=False)
    note: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels that it needs, without label_."""
        asked = (name.removeprefix("label_") for name in self.where if name.startswith("label_"))
        return (self.label, *asked)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Tasks of one data set.

    Attributes:
      note: what a reader must know before reading the numbers.
      folds: of the cross-validation; 0: the splits of the index.
      breakdown: columns of `breakdown.breakdown`.
      dense: whether findings have places, which patch features can be asked for.
    """

    title: str
    note: str
    tasks: tuple[Task, ...]
    folds: int = 0
    breakdown: tuple[str, ...] = ()
    dense: bool = False


FILM, DBT = ("film",), ("dbt",)
SITE_1 = {"site": ("site 1",)}

BENCHMARKS = {
    "vindr": Benchmark(
        title="VinDr-Mammo",
        note="There is no biopsy: BI-RADS 4 or 5 of a breast stands in for cancer, BI-RADS 5 alone is the "
        "stricter form with 23 positive breasts in the official test. Official test; validation is cut off "
        "the official training part. Lesions are findings of BI-RADS 3 to 5: an image without one may show "
        "a benign lesion. 77 % of the test images have density C.",
        tasks=(
            Task("suspicious, BI-RADS 4-5", "suspicious_birads45", level="breast"),
            Task("suspicious, BI-RADS 5", "suspicious_birads5", level="breast"),
            Task("lesion", "lesion"),
            Task("mass", "mass"),
            Task("calcification", "calcification"),
            Task("BI-RADS", "birads", level="breast"),
            Task("density", "density", level="breast"),
        ),
        breakdown=("manufacturer", "model", "view", "density", "lesion_size", "lesion_type", "resolution"),
        dense=True,
    ),
    "rsna": Benchmark(
        title="RSNA Screening Mammography",
        note="Cancer is of a breast, 2 % of them; most negatives had no biopsy. Density, recall and BI-RADS "
        "are of site 1 only: site 2 has no density and no other BI-RADS than 0, so that over both sites a "
        "probe would score by telling the sites apart. Lesions have neither type nor place here; the "
        "breakdown of cancers is by invasiveness. No official split: 5 folds by patient.",
        tasks=(
            Task("cancer", "cancer_biopsy", level="breast"),
            Task(
                "cancer, single images",
                "cancer_biopsy",
                note="each image has the label of its breast, whether or not the cancer shows in that view",
            ),
            Task("density", "density", level="breast", where=SITE_1),
            Task("recall", "recall", level="breast", where=SITE_1),
            Task(
                "BI-RADS 1 or 2",
                "birads",
                level="breast",
                where=SITE_1,
                note="negative against benign: says nothing on cancer, and is not the five-class task of "
                "other data sets",
            ),
        ),
        folds=5,
        breakdown=("site", "model", "view", "density", "implant", "invasive", "resolution"),
    ),
    "embed": Benchmark(
        title="EMBED Open Data",
        note="Cancer is by biopsy, of screening exams by follow-up of a year. 2D and synthetic 2D images are "
        "asked apart. A patient has exams over years: intervals are over patients. No official split: that "
        "of the build. Probes and features made from EMBED fall under its terms: no release.",
        tasks=(
            Task("cancer", "cancer_biopsy", level="breast"),
            Task("cancer, synthetic 2D", "cancer_biopsy", ("synthetic2d",), level="breast"),
            Task("suspicious, BI-RADS 4-5", "suspicious_birads45", level="breast"),
            Task("recall", "recall", level="breast"),
            Task("BI-RADS", "birads", level="breast"),
            Task("density", "density", level="exam"),
        ),
        breakdown=("manufacturer", "model", "density", "implant", "lesion_size", "resolution"),
        dense=True,
    ),
    "cbis_ddsm": Benchmark(
        title="CBIS-DDSM",
        note="Digitised films, each with a lesion and its biopsy; no normals. The official splits of masses "
        "and of calcifications were made apart, so their films are asked apart (a film with both is in "
        "both, malignant where either is); a patient who is in either official test is test here with all "
        "films, where the official lists would leave some in training. "
        "Validation is cut off the official training parts.",
        tasks=(
            Task("cancer, masses", "cancer_biopsy", FILM, where={"label_mass": (1,)}),
            Task("cancer, calcifications", "cancer_biopsy", FILM, where={"label_calcification": (1,)}),
            Task("density", "density", FILM),
        ),
        breakdown=("view", "density", "lesion_size"),
        dense=True,
    ),
    "inbreast": Benchmark(
        title="INbreast",
        note="There is no biopsy result: BI-RADS 4 or 5 of an image stands in for cancer; known cancers "
        "(BI-RADS 6) are unknown. 410 images: intervals are wide. No official split: 5 folds by patient.",
        tasks=(
            Task("suspicious, BI-RADS 4-5", "suspicious_birads45"),
            Task("lesion", "lesion"),
            Task("mass", "mass"),
            Task("calcification", "calcification"),
            Task("BI-RADS", "birads"),
            Task("density", "density"),
        ),
        folds=5,
        breakdown=("view", "density", "lesion_size", "lesion_type"),
        dense=True,
    ),
    "cmmd": Benchmark(
        title="CMMD",
        note="Breasts with a biopsy only: malignant against benign lesions, not against normal breasts. The "
        "other breasts are unlabelled and left out. One vendor. No official split: 5 folds by patient.",
        tasks=(
            Task("cancer", "cancer_biopsy", level="breast"),
            Task("mass", "mass", level="breast", note="masses against calcifications alone"),
            Task(
                "calcification", "calcification", level="breast", note="calcifications against masses alone"
            ),
        ),
        folds=5,
        breakdown=("lesion_type", "resolution"),
    ),
    "bcs_dbt": Benchmark(
        title="BCS-DBT",
        note="Tomosynthesis volumes, official train, validation and test. Cancer is asked against benign "
        "(biopsy) and normal (none) volumes; recalled volumes without a biopsy (actionable) count as lesions "
        "and say nothing on cancer. 60 cancer volumes in the test: intervals are wide.",
        tasks=(Task("lesion", "lesion", DBT), Task("cancer", "cancer_biopsy", DBT)),
        breakdown=("view", "model", "lesion_size", "resolution"),
        dense=True,
    ),
    "minimias": Benchmark(
        title="mini-MIAS",
        note="322 films, all MLO. Density is not BI-RADS. Films without an "
        "abnormality had no biopsy. No official split: 5 folds by patient.",
        tasks=(
            Task("density (fatty, glandular, dense)", "fgd", FILM),
            Task("abnormality", "lesion", FILM),
            Task(
                "cancer among abnormalities",
                "cancer_biopsy",
                FILM,
                where={"label_lesion": (1,)},
                note="about 50 malignant films: a wide interval",
            ),
        ),
        folds=5,
        breakdown=("fgd", "lesion_size", "lesion_type"),
        dense=True,
    ),
    "phantom": Benchmark(
        title="Synthetic breast phantoms",
        note="Simulated breasts: the scores show that the programs work, they say nothing about patients. "
        "Density, cancer and lesion are asked of single 2D images; tomosynthesis volumes are a task of their "
        "own and never mixed with 2D images.",
        tasks=(
            Task("density", "density"),
            Task("cancer", "cancer"),
            Task("lesion", "lesion"),
            Task("density, DBT volumes", "density", DBT),
        ),
        breakdown=("manufacturer", "view", "density", "lesion_size"),
        dense=True,
    ),
}


LABELS = "labels"  # the benchmark of any data set: every label of it, and of each kind of image


def find(name: str, rows=None) -> Benchmark:
    """The benchmark called `name`; `labels` is made of the labels of `rows` (items.Rows).

    Raises:
      UserError: there is none of that name (with a suggestion), or the data have no labels.
    """
    if name == LABELS and rows is not None:
        return _of_labels(rows)
    if name not in (*BENCHMARKS, LABELS):
        known = ", ".join((*BENCHMARKS, LABELS))
        close = suggest(name, (*BENCHMARKS, LABELS))
        raise UserError(f'unknown benchmark "{name}".{close} Known: {known}')
    return BENCHMARKS.get(name)


def _of_labels(rows) -> Benchmark:
    tasks = []
    for label, value in rows.labels.items():
        kinds = sorted({kind for kind in rows.columns["kind"][value >= 0] if kind})
        for kind in kinds:
            known = np.unique(value[(rows.columns["kind"] == kind) & (value >= 0)])
            if len(known) > 1:
                name = f"{label}, {kind}" if len(kinds) > 1 else label
                tasks.append(Task(name, label, (kind,), rows.levels.get(label, "image")))
    if not tasks:
        raise UserError("no label of the data has two known values; give label_<name> columns in labels.csv")
    return Benchmark(
        title="All labels of the data",
        note="What a label means is in labels.json of the data. Splits are those of the build; --folds 5 "
        "cross-validates small data sets.",
        tasks=tuple(tasks),
        breakdown=(
            "site",
            "manufacturer",
            "model",
            "view",
            "density",
            "implant",
            "lesion_size",
            "resolution",
        ),
        dense=True,
    )


def asked_of(task: Task, rows, items) -> np.ndarray:
    """Which items a task is asked of: bool [n], those of its kinds and `where` whose label is known.

    Args:
      rows: items.Rows, with all of `task.labels`.
      items: items.Items of the task's level.
    """
    asked = np.isin(items.kind, task.kinds) & (items.label(task.label) >= 0)
    for name, allowed in task.where.items():
        is_label = name.startswith("label_")
        value = items.label(name.removeprefix("label_")) if is_label else common(items, rows.columns[name])
        asked &= np.isin(value, allowed)
    return asked
