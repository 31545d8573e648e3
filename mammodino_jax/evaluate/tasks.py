"""Tasks of a benchmark over data: which items they ask, in which folds, and what probes answer."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from absl import logging

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import probes
from mammodino_jax.evaluate.benchmarks import Benchmark, Task, asked_of
from mammodino_jax.evaluate.breakdown import breakdown as cut
from mammodino_jax.evaluate.features import aggregate
from mammodino_jax.evaluate.items import Items, Rows, group
from mammodino_jax.evaluate.metrics import summarise
from mammodino_jax.evaluate.probes import Fold


@dataclasses.dataclass(frozen=True)
class Question:
    """A task with its items.

    Attributes:
      chosen: i64 [m], places of the labelled items among `items`.
      label: i64 [m], 0..C-1; classes: the label value of each of these.
      folds: places among the m.
    """

    task: Task
    items: Items
    chosen: np.ndarray
    label: np.ndarray
    classes: np.ndarray
    folds: list[Fold]

    @property
    def patient(self) -> np.ndarray:
        return self.items.patient[self.chosen]

    def tested(self) -> np.ndarray:
        """bool [r]: records of the items that test."""
        test = self.chosen[np.unique(np.concatenate([f.test for f in self.folds]))]
        return np.isin(self.items.item, test)


def ask(
    benchmark: Benchmark, rows: Rows, folds: int, repeats: int, seed: int
) -> tuple[list[Question], list[str]]:
    """The tasks that these data can answer, and the names of those whose kind of image is not there.

    Args:
      folds: of a cross-validation over all splits; 0: the splits of the index.

    Raises:
      UserError: a label is missing from the data, or known for no item, or has one value only; folds that do
        not suit.
    """
    questions, absent = [], []
    there = ", ".join(rows.labels) or "none"
    for task in benchmark.tasks:
        for label in task.labels:
            if label not in rows.labels:
                raise UserError(f'task "{task.name}" needs the label "{label}"; labels there are: {there}')
        items = group(rows, task.level, task.kinds)
        if not len(items.first):
            absent.append(task.name)
            continue
        chosen = np.flatnonzero(asked_of(task, rows, items))
        classes, label = np.unique(items.label(task.label)[chosen], return_inverse=True)
        if len(classes) < 2:
            raise UserError(
                f'task "{task.name}": label "{task.label}" has {len(classes)} known values over the '
                f"{'/'.join(task.kinds)} items, two or more are needed; labels there are: {there}"
            )
        if folds:
            patient = items.patient[chosen]
            drawn = probes.cross_folds(label, patient, folds, seed, task.name, repeats)
        else:
            drawn = probes.official_fold(items.split[chosen], task.name)
            if len(np.unique(label[drawn[0].test])) < 2:
                raise UserError(
                    f'task "{task.name}": the test split has one value of label "{task.label}" only; use '
                    "--folds 5 to cross-validate over all splits"
                )
        questions.append(Question(task, items, chosen, label, classes, drawn))
    if not questions:
        kinds = ", ".join(sorted(set(rows.columns["kind"])))
        raise UserError(f"the data hold {kinds} records, none of the benchmark")
    return questions, absent


def item_features(question: Question, entry, features: dict, parts: tuple[str, ...], how: str) -> np.ndarray:
    """f32 [m, F] of the labelled items: the parts of an encoder side by side, or all that a baseline has."""
    found = [features[p] for p in parts if p in features] or list(features.values())
    return aggregate(np.concatenate(found, axis=1), entry.rows, question.items, how)[question.chosen]


def answer(
    question: Question, entries: list, features: Callable, args, breakdown: tuple[str, ...]
) -> tuple[dict, list]:
    """Probe all entries on one task.

    Args:
      features: entry to {part: f32 [r, F]}.
      args: of the command line: probes, features, aggregate, few_labels, draws, seed, cache.

    Returns:
      The task's facts with a row for each entry and probe, and [(entry name, probe, its folds' Scored)].
    """
    task, items, folds = question.task, question.items, question.folds
    rows, scored, few_label = [], [], {}
    for entry in entries:
        suited = applicable(entry, args.probes)
        shown = "linear" if "linear" in suited else suited[-1] if suited else ""  # has the breakdown
        for name in suited:
            reader = _reader(question, entry, name, features, args)
            whole = name in ("attentive", "finetune")
            tested, chosen = _run(question, reader, folds, args)
            scored.append((entry.name, name, tested))
            metrics = summarise(tested, args.draws, args.seed)
            groups = breakdown if entry.spec and name == shown else ()
            rows.append({
                "features": entry.name, "encoder": entry.spec, "kind": entry.kind, "probe": name,
                "long_side": entry.long_side, "mm_per_px": entry.mm(question.tested()),
                "aggregate": None if whole else args.aggregate, "metrics": metrics,
                "not_computed": metrics["auc"]["not_computed"], "chosen": chosen,
                "remarks": list(entry.remarks),
                "breakdown": cut(
                    entry.rows, items, question.chosen, folds, tested, groups, args.draws, args.seed
                ),
            })  # fmt: skip
            if args.few_labels and entry.extractor:
                draws = probes.DRAWS if name in probes.PROBES else 1  # the others take minutes each
                few_label.setdefault(entry.name, {})[name] = _few_labels(question, reader, draws, args)
    test = np.concatenate([f.test for f in folds if f.repeat == 0])
    names = dict(enumerate(items.rows.class_names.get(task.label, [])))
    counts = np.bincount(question.label[test], minlength=len(question.classes)).tolist()
    facts = {
        "task": task.name, "label": task.label, "kinds": task.kinds, "level": task.level,
        "note": task.note, "classes": question.classes.tolist(),
        "folds": sum(f.repeat == 0 for f in folds), "repeats": 1 + max(f.repeat for f in folds),
        "train_items": int(np.mean([len(f.train) for f in folds])),
        "test_items": len(test), "test_patients": len(np.unique(question.patient[test])),
        "test_items_by_class": {
            names.get(c, str(c)): n for c, n in zip(question.classes.tolist(), counts, strict=True)
        },
        "rows": rows, "few_label": few_label,
    }  # fmt: skip
    return facts, scored


def applicable(entry, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The probes that suit an entry: only encoders have patch tokens, only our ViTs can be fine-tuned."""
    if not entry.extractor:
        return ("none",)
    allowed = {*probes.PROBES, *(("attentive",) if entry.encoder else ())}
    allowed |= {"finetune"} if entry.encoder and entry.encoder.vit else set()
    return tuple(name for name in asked if name in allowed)


def _reader(question: Question, entry, name: str, features: Callable, args) -> tuple:
    """A probe, what it reads, and what stands for that in the cache ("": the features themselves)."""
    if name == "none":
        return probes.majority, None, "none"
    if name in probes.PROBES:
        x = item_features(question, entry, features(entry), args.parts, args.aggregate)
        return probes.PROBES[name], x, ""
    from mammodino_jax.evaluate import attentive, finetune  # late: they import jax

    rows, items, encoder, side = entry.rows, question.items, entry.encoder, entry.long_side
    ids = [rows.columns[c][items.item >= 0].tolist() for c in ("image_id", "pixel_hash")]
    config = finetune.FinetuneConfig(**({"micro_batch": args.batch_size} if args.batch_size else {}))
    how = attentive.SIDE if name == "attentive" else config
    key = repr((encoder.fingerprint, side, question.task.level, ids, how))

    @functools.cache
    def cells():
        asked = items.take(question.chosen)
        *found, left_out = attentive.item_cells(rows, asked, encoder, side, batch_size=args.batch_size)
        if left_out:
            logging.warning(
                "%s: %d images beyond the first %d of a %s are not read by the attentive probe",
                question.task.name, left_out, attentive.IMAGES, question.task.level,
            )  # fmt: skip
        return tuple(found)

    def on_cells(x, *rest):
        return attentive.attentive(x(), *rest)

    def on_images(x, *rest):
        return finetune.finetune(x, *rest, encoder, side, config)

    if name == "attentive":
        return on_cells, cells, key
    return on_images, finetune.images_of(rows, items, question.chosen), key


def _run(question: Question, reader: tuple, folds, args):
    """A probe's Scored and settings on every fold."""
    probe, x, key = reader
    found = probes.run(
        probe, x, question.label, question.patient, folds, len(question.classes), args.seed, args.cache, key
    )
    ids = question.items.id[question.chosen]
    tested = [
        dataclasses.replace(t, item=ids[fold.test], repeat=fold.repeat)
        for t, fold in zip(found[0], folds, strict=True)
    ]
    return tested, found[1]


def _few_labels(question: Question, reader: tuple, draws: int, args) -> list[dict]:
    """AUC with labels of a share of the patients that train and choose, drawn so often."""
    curve, repeated = [], any(f.repeat for f in question.folds)
    for share in probes.SHARES:
        times = 1 if repeated or share >= 1 else draws
        folds = [
            dataclasses.replace(few, repeat=few.repeat + draw)
            for draw in range(times)
            for few in (
                probes.few(f, question.label, question.patient, share, args.seed + draw)
                for f in question.folds
            )
        ]
        tested, _ = _run(question, reader, folds, args)
        auc = summarise(tested, args.draws, args.seed, ("auc",))["auc"]
        patients = np.mean([len(np.unique(question.patient[np.r_[f.train, f.val]])) for f in folds])
        point = {"share": share, "patients": int(patients), "auc": auc["value"]}
        curve.append(point | {name: auc[name] for name in ("low", "high", "seed_std")})
    return curve
