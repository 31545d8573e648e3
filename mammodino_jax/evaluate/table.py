"""The Markdown table of an evaluation."""

LEGEND = (
    "Transductive: pretraining saw test patients. Not computed: a training or test part lacks a class. "
    "No interval: most draws of patients lack one."
)


def markdown(results: dict) -> str:
    """The results as Markdown: a table a task."""
    settings = results["settings"]
    lines = [f"# {results['title']}", "", results["note"], ""]
    grouping = (
        f"{settings['folds']}-fold cross-validation, patients kept together, AUC averaged over folds"
        if settings["folds"]
        else "splits of the index (train, val, test)"
    )
    lines += [
        f"Probes on frozen features; {grouping}. AUC is macro one-vs-rest where there are more than two "
        f"classes; intervals: 95 %, {settings['draws']} draws of test patients. {LEGEND}",
        "",
    ]
    for task in results["tasks"]:
        lines += [f"## {task['task']}", "", tested(task), ""]
        lines += [
            "| features | probe | input | AUC [95 %] | balanced accuracy | |",
            "|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(cells(row))} |" for row in task["rows"]] + [""]
    if results["absent_tasks"]:
        lines += [f"Not asked, no such images in the data: {', '.join(results['absent_tasks'])}.", ""]
    if results["data"]["records_left_out"]:
        lines += [f"{results['data']['records_left_out']} records left out (duplicates, or flagged).", ""]
    return "\n".join(lines)


def tested(task: dict) -> str:
    """How much a task was tested on, in words."""
    by_class = ", ".join(f"{n} {name}" for name, n in task["test_items_by_class"].items())
    return f"{task['test_items']} test items ({by_class}) of {task['test_patients']} patients."


def cells(row: dict) -> list[str]:
    """A row of results as text: features, probe, input, AUC, balanced accuracy, remarks."""
    spacing = f", {row['mm_per_px']:.2f} mm/px" if row["mm_per_px"] else ""
    interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row["low"] is not None else ""
    said = {"yes": "transductive", "unknown": "pretraining patients unknown"}
    remarks = [said[row["seen"]]] if row["seen"] in said else []
    if row["auc"] is not None and row["low"] is None:
        remarks.append("no interval: too few patients")
    if row["not_computed"]:
        remarks.append(f"{row['not_computed']} fold AUCs not computed")
    return [
        row["features"],
        row["probe"] if row["probe"] != "none" else "-",
        f"{row['long_side']} px{spacing}" if row["long_side"] else "-",
        f"{row['auc']:.3f}{interval}" if row["auc"] is not None else "not computed",
        f"{row['balanced_accuracy']:.3f}",
        "; ".join(remarks),
    ]
