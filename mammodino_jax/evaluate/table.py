"""The Markdown table of an evaluation."""

from collections.abc import Iterable

from mammodino_jax.evaluate.metrics import METRICS

LEGEND = (
    "Transductive: pretraining saw test patients. Not computed: a training or test part lacks a class. "
    "No interval: most draws of patients lack one. An interval without width: every draw gave the same, as "
    "at an AUC of 1; other patients may not. -: of two classes only."
)
TITLES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "pf1": "pF1",
}
BESIDE = METRICS[1:]  # without intervals, for want of room
HEAD = ["features", "probe", "input", "AUC [95 %]", *(TITLES[name] for name in BESIDE), ""]


def markdown(results: dict) -> str:
    """The results as Markdown: a table a task."""
    settings = results["settings"]
    lines = [f"# {results['title']}", "", results["note"], ""]
    grouping = (
        f"{settings['folds']}-fold cross-validation, patients kept together, metrics averaged over folds"
        if settings["folds"]
        else "splits of the index (train, val, test)"
    )
    lines += [
        f"Probes on frozen features; {grouping}. AUC and average precision are macro one-vs-rest where there "
        f"are more than two classes; intervals: 95 %, BCa bootstrap of {settings['draws']} draws of test "
        f"patients; seeds: standard deviation over repeats with other folds. {LEGEND}",
        "",
    ]
    for task in results["tasks"]:
        lines += [f"## {task['task']}", "", tested(task), ""]
        lines += grid(HEAD, map(cells, task["rows"])) + [""]
    if results.get("dense", {}).get("rows"):
        lines += dense_lines(results["dense"])
    if results["absent_tasks"]:
        lines += [f"Not asked, no such images in the data: {', '.join(results['absent_tasks'])}.", ""]
    if results["data"]["records_left_out"]:
        lines += [f"{results['data']['records_left_out']} records left out (duplicates, or flagged).", ""]
    return "\n".join(lines)


def tested(task: dict) -> str:
    """How much a task was tested on, in words."""
    by_class = ", ".join(f"{n} {name}" for name, n in task["test_items_by_class"].items())
    return f"{task['test_items']} test items ({by_class}) of {task['test_patients']} patients."


def dense_lines(dense: dict) -> list[str]:
    """Lines of Markdown: how well patch tokens tell lesions from other tissue, and find them."""
    rates = ("1", "2", "4")
    head = ["features", "items", "rank [95 %]", "rank by chance", "AUC [95 %]"]
    lines = [
        [row["features"], f"{row['unit']}s", estimate(row["supervised_rank"]), chance(row),
         estimate(row["supervised_auc"]), *(_value(row["sensitivity"][rate]) for rate in rates),
         "; ".join(row["remarks"])]
        for row in dense["rows"]
    ]  # fmt: skip
    return [
        "## Where lesions are, by patch tokens", "",
        "Linear probe of patches. Rank: share of the other tissue's patches below a lesion's best. "
        "Sensitivity at so many false positives an image or volume.", "",
        *grid([*head, *(f"sensitivity at {rate}" for rate in rates), ""], lines), "",
    ]  # fmt: skip


def chance(row: dict) -> str:
    """What the best of as many patches as lesions have ranks, where they say nothing."""
    return f"{row['rank_chance']:.3f}" if row["rank_chance"] is not None else "-"


def grid(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def estimate(metric: dict) -> str:
    """A metric with its interval."""
    if metric["value"] is None:
        return "not computed"
    interval = f" [{metric['low']:.3f}, {metric['high']:.3f}]" if metric["low"] is not None else ""
    return f"{metric['value']:.3f}{interval}"


def size(row: dict) -> str:
    """The input of a row's features."""
    spacing = f", {row['mm_per_px']:.2f} mm/px" if row["mm_per_px"] else ""
    return f"{row['long_side']} px{spacing}" if row["long_side"] else "-"


def cells(row: dict) -> list[str]:
    """A row of results as text, under `HEAD`."""
    metrics, remarks = row["metrics"], list(row["remarks"])
    auc = metrics["auc"]
    if auc["value"] is not None and auc["low"] is None:
        remarks.append("no interval: too few patients")
    if row["not_computed"]:
        remarks.append(f"{row['not_computed']} fold AUCs not computed")
    seeds = f", seeds ±{auc['seed_std']:.3f}" if auc["seed_std"] is not None else ""
    return [
        row["features"],
        row["probe"] if row["probe"] != "none" else "-",
        size(row),
        estimate(auc) + seeds,
        *(_value(metrics[name]) if name in metrics else "-" for name in BESIDE),
        "; ".join(remarks),
    ]


def _value(metric: dict) -> str:
    return estimate({**metric, "low": None})
