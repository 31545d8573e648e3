"""Compare encoders: the results of one or several evaluations in one table, tested against a reference.

    python -m mammodino_jax.compare RESULTS... --output DIR [--reference NAME]

RESULTS are output folders of evaluate on the same benchmark, data and folds. Writes compare.md, compare.html
and compare.json. The reference is the first DINOv2 row, or else the first encoder.
"""

import argparse
import html
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mammodino_jax.encoder import FOREIGN
from mammodino_jax.errors import UserError, run_command, suggest
from mammodino_jax.evaluate.metrics import Scored, resample
from mammodino_jax.evaluate.paired import delong, difference, holm, same_items
from mammodino_jax.evaluate.scores import NAME, read_scores
from mammodino_jax.evaluate.table import TITLES, estimate, grid, size, tested
from mammodino_jax.page import page, paragraph, section, table

LEVEL = 0.05
DRAWS = 10_000
BETTER, WORSE = "↑", "↓"


class Run(NamedTuple):
    """What evaluate left in a folder."""

    folder: Path
    results: dict
    scores: dict[tuple[str, str, str], list[Scored]]

    def task(self, name: str) -> list[Scored]:
        """The folds of a task, whatever was said of them."""
        return next(folds for (task, *_), folds in self.scores.items() if task == name)


class System(NamedTuple):
    """A row of the table: features under one probe."""

    rows: dict[str, dict]  # by task, as in results.json
    scores: dict[str, list[Scored]]


def read_run(folder: Path) -> Run:
    """Raises UserError: the folder holds no results of evaluate, of an earlier version, or of two runs."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; run first: python -m mammodino_jax.evaluate")
    try:
        results = json.loads(path.read_text())
        keys = {
            (t["task"], r["features"], r["probe"])
            for t in results["tasks"]
            for r in t["rows"]
            if r["metrics"]
        }
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged, or of an earlier version; run evaluate again") from None
    scores = read_scores(folder / NAME)
    if not keys <= scores.keys():
        raise UserError(f"{folder / NAME} lacks rows of {path}; run evaluate again")
    return Run(folder, results, scores)


def check_alike(first: Run, other: Run) -> None:
    """Raise a UserError that names both folders where two runs did not ask the same of the same items."""

    def refuse(what: str) -> None:
        raise UserError(
            f"{first.folder} and {other.folder} cannot be compared, {what}; evaluate both with the same "
            "benchmark, data, folds, repeats and seed"
        )

    def facts(run: Run, name: str) -> list:
        return [task[name] for task in run.results["tasks"]]

    if first.results["benchmark"] != other.results["benchmark"]:
        refuse(f"their benchmarks differ: {first.results['benchmark']} and {other.results['benchmark']}")
    for name in ("task", "level", "classes", "folds", "repeats"):
        if facts(first, name) != facts(other, name):
            refuse(f"{name} of their tasks differs: {facts(first, name)} and {facts(other, name)}")
    for name in facts(first, "task"):
        try:
            same_items(first.task(name), other.task(name))
        except ValueError as reason:
            refuse(f'their items of task "{name}" differ: {reason}')


def collect(runs: list[Run], probe: str) -> dict[str, System]:
    """The systems by name: what two runs both have (baselines) once, other features of one name told apart.

    Raises:
      UserError: no such probe in a run.
    """
    systems: dict[str, System] = {}
    names: dict[str, str] = {}  # of a system: of its features
    for run in runs:
        mine: dict[str, System] = {}
        for task in run.results["tasks"]:
            probes = {row["probe"] for row in task["rows"]} - {"none"}
            if probe not in probes:
                raise UserError(
                    f'{run.folder} has no probe "{probe}" in task "{task["task"]}".{suggest(probe, probes)} '
                    f"Probes there: {', '.join(sorted(probes)) or 'none'}"
                )
            for row in task["rows"]:
                if row["probe"] in (probe, "none"):
                    system = mine.setdefault(row["features"], System({}, {}))
                    system.rows[task["task"]] = row
                    system.scores[task["task"]] = run.scores[task["task"], row["features"], row["probe"]]
        for features, system in mine.items():
            if any(names[n] == features and _equal(s, system) for n, s in systems.items()):
                continue
            name = features if features not in systems else f"{features} ({run.folder.name})"
            while name in systems:
                name += "'"
            systems[name], names[name] = system, features
    return systems


def _equal(one: System, other: System) -> bool:
    pairs = [(f, g) for name in one.scores for f, g in zip(one.scores[name], other.scores[name], strict=True)]
    return all(np.array_equal(f.score, g.score, equal_nan=True) for f, g in pairs)


def find_reference(systems: dict[str, System], asked: str | None) -> str:
    """Raises UserError: the one asked for is not there, or none was and there is no encoder."""
    if asked is not None:
        if asked not in systems:
            raise UserError(
                f'--reference "{asked}" is no row.{suggest(asked, systems)} Rows: {", ".join(systems)}'
            )
        return asked
    specs = {name: next(iter(s.rows.values()))["encoder"] for name, s in systems.items()}
    encoders = [name for name, spec in specs.items() if spec is not None]
    if not encoders:
        raise UserError(f"there is no encoder to compare with; name one by --reference: {', '.join(systems)}")
    theirs = [n for n in encoders if next(iter(systems[n].rows.values()))["kind"] in FOREIGN]
    return next((n for n in theirs if "dinov2" in f"{n} {specs[n]}".lower()), encoders[0])


def compare(runs: list[Run], probe: str, metric: str, asked: str | None) -> dict:
    """The comparison, as JSON.

    Returns:
      {benchmark, title, note, probe, metric, reference, level, draws, comparisons, results, tasks, systems:
      [{system, reference: bool, encoder, long_side, mm_per_px, remarks, tasks: {task: {value, low, high,
      seed_std, and against the reference difference, difference_low, difference_high, p, p_holm, mark ("" or
      BETTER or WORSE), delong}}}]}.

    Raises:
      UserError: runs that cannot be compared, or a probe, metric or reference that is not there.
    """
    for run in runs[1:]:
        check_alike(runs[0], run)
    systems = collect(runs, probe)
    reference = find_reference(systems, asked)
    tasks = [task["task"] for task in runs[0].results["tasks"]]
    asked_of = [t for t in tasks if metric in systems[reference].rows[t]["metrics"]]
    if not asked_of:
        raise UserError(f"--metric {metric} is of no task in {runs[0].folder}")
    draws = max(
        DRAWS, 100 * len(asked_of) * (len(systems) - 1)
    )  # Holm asks for p as small as level / comparisons
    lines = []
    for name, system in systems.items():
        remarks = dict.fromkeys(r for row in system.rows.values() for r in row["remarks"])
        one = next(iter(system.rows.values()))
        line = {"system": name, "reference": name == reference, "remarks": list(remarks), "tasks": {}}
        lines.append(line | {key: one[key] for key in ("encoder", "long_side", "mm_per_px")})
    tests = []
    for task in asked_of:
        theirs = systems[reference].scores[task]
        against = resample(theirs, draws, 0, [metric])[0]
        for line in lines:
            system = systems[line["system"]]
            known = system.rows[task]["metrics"][metric]
            cell = line["tasks"][task] = {k: known[k] for k in ("value", "low", "high", "seed_std")}
            if line["reference"]:
                continue
            found = difference(resample(system.scores[task], draws, 0, [metric])[0], against)
            if found:
                low, high = found["low"], found["high"]
                cell |= {"difference": found["difference"], "difference_low": low, "difference_high": high}
                cell |= {"p": found["p"], "delong": _delong(system.scores[task], theirs, metric)}
                tests.append(cell)
    for cell, p in zip(tests, holm([cell["p"] for cell in tests]), strict=True):
        mark = (BETTER if cell["difference"] > 0 else WORSE) if p < LEVEL else ""
        cell |= {"p_holm": p, "mark": mark}
    facts = {name: runs[0].results[name] for name in ("benchmark", "title", "note")}
    facts |= {"probe": probe, "metric": metric, "reference": reference, "level": LEVEL, "draws": draws}
    facts |= {"comparisons": len(tests), "results": [run.folder.name for run in runs]}
    tested_on = [
        {k: v for k, v in task.items() if k not in ("rows", "few_label")} for task in runs[0].results["tasks"]
    ]
    return facts | {"tasks": tested_on, "systems": lines}


def _delong(one: list[Scored], other: list[Scored], metric: str) -> dict:
    """z and p of DeLong's test where it holds, else why not."""
    if metric != "auc":
        return {"refused": "DeLong's test is of AUCs"}
    try:
        found = delong(one, other)
    except ValueError as reason:
        return {"refused": str(reason)}
    if not np.isfinite(found["z"]):
        return {"refused": "the difference does not vary"}
    return {"z": found["z"], "p": found["p"]}


def legend(found: dict) -> str:
    """What the cells and marks mean."""
    return (
        f"{TITLES[found['metric']]} of the {found['probe']} probe on frozen features, with its 95 % interval "
        "over test patients (AUC and average precision: macro one-vs-rest where there are more than two "
        "classes); seeds: standard deviation over repeats of the cross-validation. "
        f"{BETTER} better, {WORSE} worse than {found['reference']}: p < {found['level']} in a two-sided "
        f"paired bootstrap of patients ({found['draws']} draws), after Holm's correction over all "
        f"{found['comparisons']} comparisons of this table. No mark: no difference is shown, which does not "
        "mean that there is none. An interval without width: every draw gave the same; other patients may "
        "not. -: the metric is not of this task."
    )


def cell(of_task: dict | None) -> str:
    if of_task is None:
        return "-"
    seeds = f", seeds ±{of_task['seed_std']:.3f}" if of_task["seed_std"] is not None else ""
    return f"{estimate(of_task)}{seeds} {of_task.get('mark', '')}".strip()


def main_table(found: dict) -> tuple[list[str], list[list[str]]]:
    """Systems as rows, tasks as columns."""
    names = [task["task"] for task in found["tasks"]]
    rows = []
    for line in found["systems"]:
        name = f"{line['system']} (reference)" if line["reference"] else line["system"]
        rows.append(
            [name, size(line), *(cell(line["tasks"].get(n)) for n in names), "; ".join(line["remarks"])]
        )
    return ["system", "input", *names, ""], rows


def differences(found: dict, task: str) -> tuple[list[str], list[list[str]]]:
    """A task's differences from the reference, with p-values."""
    rows = []
    for line in found["systems"]:
        c = line["tasks"].get(task, {})
        if "difference" in c:
            between = f"{c['difference']:+.3f} [{c['difference_low']:+.3f}, {c['difference_high']:+.3f}]"
            p = f"{c['delong']['p']:.2g}" if "p" in c["delong"] else "-"
            rows.append([line["system"], between, f"{c['p']:.2g}", f"{c['p_holm']:.2g}", c["mark"], p])
    return ["system", "difference [95 %]", "p", "p (Holm)", "", "p of DeLong"], rows


DELONG = "DeLong's p stands beside it where every patient has one item in one fold, which that test assumes."


def markdown(found: dict) -> str:
    lines = [f"# {found['title']}: comparison", "", found["note"], "", legend(found), ""]
    lines += [*grid(*main_table(found)), "", f"## Differences from {found['reference']}", "", DELONG, ""]
    for task in found["tasks"]:
        lines += [f"### {task['task']}", "", tested(task), "", *grid(*differences(found, task["task"])), ""]
    return "\n".join(lines)


def html_page(found: dict) -> str:
    """The same as one HTML file that loads nothing."""
    title = f"{found['title']}: comparison"
    marked = {i for i, line in enumerate(found["systems"]) if line["reference"]}
    parts = [f"<h1>{html.escape(title)}</h1>", paragraph(found["note"], "lead")]
    parts.append(section("Systems and tasks", table(*main_table(found), marked), paragraph(legend(found))))
    by_task = [paragraph(DELONG)]
    for task in found["tasks"]:
        by_task += [f"<h3>{html.escape(task['task'])}</h3>", table(*differences(found, task["task"]))]
        by_task.append(paragraph(tested(task)))
    parts.append(section(f"Differences from {found['reference']}", *by_task))
    return page(html.escape(title), parts)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser("python -m mammodino_jax.compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="output folders of evaluate")
    add("--output", type=Path, required=True)
    add("--reference", help="row that the others are tested against")
    add("--probe", default="linear")
    add("--metric", default="auc", choices=TITLES)
    args = parser.parse_args(argv)
    found = compare([read_run(folder) for folder in args.results], args.probe, args.metric, args.reference)
    text = markdown(found)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "compare.json").write_text(json.dumps(found, indent=1, allow_nan=False))
    (args.output / "compare.md").write_text(text)
    (args.output / "compare.html").write_text(html_page(found), encoding="utf-8")
    print(text)
    print(f"comparison: {', '.join(str(args.output / f'compare.{kind}') for kind in ('md', 'html', 'json'))}")


if __name__ == "__main__":
    run_command(main)
