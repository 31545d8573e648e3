"""Charts of the reports, as SVG: training curves, probe scores with their intervals, distributions."""

import io
import itertools

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INK, GREY, GRID = "#1f2933", "#7b8794", "#e4e7eb"
# Okabe and Ito's colours, told apart with any colour vision
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#a64d79", "#56b4e9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
TERMS = {
    "dino_global": ("DINO-M global", BLUE),
    "dino_local": ("DINO-M local", SKY),
    "ibot": ("iBOT-M", ORANGE),
    "adjacent": ("DINO-adj", GREEN),
}
STYLE = {
    "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "report",
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


def _svg(figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()


def series(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it was logged."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return tuple(np.array(pairs, float).reshape(-1, 2).T)


def _line(ax, rows, name: str, label: str, colour: str) -> None:
    """Raw values faint, their running mean over a 20th of the run strong."""
    steps, values = series(rows, name)
    if not len(steps):
        return
    ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    width = max(1, len(values) // 20)
    mean = np.convolve(values, np.ones(width) / width, "valid")
    ax.plot(steps[width - 1 :], mean, color=colour, linewidth=1.8, label=label)


def training(rows: list[dict]) -> bytes:
    """Over the steps of a run: loss terms, KoLeo, teacher entropy, learning rate, likeness, rank."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 2, figsize=(10.5, 9), width_ratios=(3, 2), layout="constrained")
        for name, (label, colour) in TERMS.items():
            _line(axes[0, 0], rows, name, label, colour)
        _line(axes[0, 1], rows, "koleo", "KoLeo", PURPLE)
        _line(axes[1, 0], rows, "teacher_entropy", "CLS", BLUE)
        _line(axes[1, 0], rows, "teacher_entropy_patch", "patches", ORANGE)
        for bound, text in ((0.98, "0.98: uniform"), (0.1, "0.1: collapsed")):
            axes[1, 0].axhline(bound, color=GREY, linewidth=1, linestyle="--")
            axes[1, 0].text(0.995, bound - 0.02, text, color=GREY, fontsize=8, ha="right", va="top",
                            transform=axes[1, 0].get_yaxis_transform())  # fmt: skip
        axes[1, 0].set_ylim(0, 1.04)
        axes[1, 1].plot(*series(rows, "lr"), color=INK, linewidth=1.8)  # a schedule is not noisy
        axes[1, 1].ticklabel_format(axis="y", style="sci", scilimits=(-3, -3))
        _line(axes[2, 0], rows, "cls_cosine", "CLS of images", BLUE)
        _line(axes[2, 0], rows, "pair_ncc", "slice pairs", GREEN)
        _line(axes[2, 0], rows, "teacher_distance", "1 - student to teacher", ORANGE)
        axes[2, 1].plot(*series(rows, "held_out/rank"), "o-", color=BLUE, linewidth=1.8, markersize=4)
        axes[2, 1].set_ylim(bottom=0)
        titles = ("Loss terms (nats)", "KoLeo", "Teacher entropy (of ln K)", "Learning rate",
                  "Likeness", "Effective rank, held-out images")  # fmt: skip
        for ax, title in zip(axes.ravel(), titles, strict=True):
            ax.set_title(title)
        for ax in axes[:, 0]:
            place = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "borderaxespad": 0}
            handles, labels = ax.get_legend_handles_labels()
            ax.legend(
                handles,
                labels,
                frameon=False,
                ncols=4,
                fontsize=8.5,
                handlelength=1,
                columnspacing=1,
                **place,
            )
        for ax in axes[2]:
            ax.set_xlabel("step")
        return _svg(figure)


def probes(results: dict) -> bytes:
    """AUC with its 95 % interval of each feature set and probe: a panel a task, a line a row of the table."""
    tasks = results["tasks"]
    names = list(dict.fromkeys(row["features"] for task in tasks for row in task["rows"]))
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        size = (10.5, lines * (0.9 + 0.42 * len(names)))
        figure, axes = plt.subplots(
            lines, columns, figsize=size, squeeze=False, sharex=True, layout="constrained"
        )
        for ax in axes.ravel()[len(tasks) :]:
            ax.set_visible(False)
        for ax, task in zip(axes.ravel(), tasks, strict=False):
            asked = list(dict.fromkeys(row["probe"] for row in task["rows"] if row["probe"] != "none"))
            for row in task["rows"]:
                auc = row["metrics"]["auc"]
                if auc["value"] is None:
                    continue
                y = names.index(row["features"])
                if row["probe"] in asked:
                    y += 0.64 * (asked.index(row["probe"]) + 0.5) / len(asked) - 0.32
                colour = BLUE if row["encoder"] else GREY
                if auc["low"] is not None:
                    ends = [auc["low"], auc["high"]]
                    ax.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="round")
                face = "white" if row["probe"] == "kNN" else colour
                shape = {"attentive": "s", "finetune": "D"}.get(row["probe"], "o")
                ax.plot(auc["value"], y, shape, color=colour, markerfacecolor=face, markersize=6)
            ax.axvline(0.5, color=GREY, linewidth=1, linestyle="--")
            ax.set_yticks(range(len(names)), names, color=INK)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.set_xlim(-0.02, 1.02)
            ax.set_title(f"{task['task']} ({task['test_items']} items, {task['test_patients']} patients)")
            ax.set_xlabel("AUC")
        return _svg(figure)


def boxes(panels: dict[str, dict[str, list[float]]]) -> bytes:
    """Distributions: a panel a quantity, a box a group (quartiles, median; whiskers: 5 % to 95 %)."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(groups) for groups in panels.values())
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        size = (10.5, lines * (0.75 + 0.34 * tallest))
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for ax in axes.ravel()[len(panels) :]:
            ax.set_visible(False)
        for ax, (title, groups) in zip(axes.ravel(), panels.items(), strict=False):
            for y, values in enumerate(groups.values(), start=1):
                low, first, middle, third, high = np.percentile(values, (5, 25, 50, 75, 95))
                ax.plot([low, high], [y, y], color=INK, linewidth=1)
                ax.barh(y, third - first, left=first, height=0.55, color=SKY, edgecolor=INK, linewidth=0.8)
                ax.plot([middle, middle], [y - 0.27, y + 0.27], color=INK, linewidth=2)
            ax.set_yticks(range(1, len(groups) + 1), [f"{g} ({len(v)})" for g, v in groups.items()])
            ax.set_ylim(tallest + 0.5, 0.5)  # the same box height in all panels
            ax.set_title(title)
        return _svg(figure)


def strokes(names, baselines) -> dict[str, dict]:
    """How the line of each name is drawn: baselines grey and broken, encoders in colours."""
    broken = itertools.cycle(("--", ":", "-.", (0, (1, 4)), (0, (8, 3)), (0, (6, 2, 1, 2, 1, 2))))
    coloured = itertools.cycle(itertools.product(("-", "--"), (BLUE, ORANGE, GREEN, PURPLE, SKY)))
    drawn = {}
    for name in names:
        style, colour = (next(broken), GREY) if name in baselines else next(coloured)
        drawn[name] = {"color": colour, "linestyle": style, "linewidth": 1.4 if name in baselines else 1.9}
    return drawn


def _legend_below(figure, drawn: dict[str, dict]) -> None:
    handles = [matplotlib.lines.Line2D([], [], **style) for style in drawn.values()]
    columns = 1 if max(map(len, drawn)) > 34 else 2
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(handles, drawn, fontsize=8.5, handlelength=3, **place)


def roc(lines: dict[str, np.ndarray], grid: np.ndarray, drawn: dict[str, dict]) -> bytes:
    """ROC curves. A line is [3, len(grid)]: sensitivity, and its band (none for baselines), at false-positive
    rates; `drawn` is from `strokes`."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(5.2, 4.7 + 0.17 * len(lines)), layout="constrained")
        ax.plot([0, 1], [0, 1], color=GRID, linewidth=1)
        for name, (middle, low, high) in lines.items():
            ax.plot([0, *grid], [0, *middle], **drawn[name])
            if drawn[name]["color"] != GREY:
                ax.fill_between(grid, low, high, color=drawn[name]["color"], alpha=0.12, linewidth=0)
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        ax.set(xlabel="false-positive rate (1 - specificity)", ylabel="sensitivity")
        _legend_below(figure, {name: drawn[name] for name in lines})
        return _svg(figure)


def points(lines: dict[str, list], drawn: dict[str, dict], xlabel: str) -> bytes:
    """AUC over x on a log axis. A line has points (x, AUC, low, high), the last two None without interval."""
    with plt.rc_context(STYLE):
        size = (5.2, 4.2 + 0.17 * len(lines))
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        ticks = sorted({point[0] for line in lines.values() for point in line})
        spread = (ticks[-1] / ticks[0]) ** 0.008  # bars stand beside each other
        ticks = [t for t, before in zip(ticks, [0, *ticks], strict=False) if t > 1.1 * before]
        for place, (name, line) in enumerate(lines.items()):
            x, y, low, high = np.array(sorted(line), float).T
            x = x * spread ** (place - len(lines) / 2)
            colour = drawn[name]["color"]
            ax.vlines(x, low, high, color=colour, linewidth=1, alpha=0.6)
            ax.plot(x, y, **drawn[name])
            ax.plot(x, y, "o", color=colour, markersize=4)
        ax.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=xlabel, ylabel="AUC")
        _legend_below(figure, {name: drawn[name] for name in lines})
        return _svg(figure)


def curves(lines: dict[str, np.ndarray], x: np.ndarray, xlabel: str, mark: float) -> bytes:
    """Percentages over x. A curve is [n, len(x)]: median of its rows, and a band of 10 % to 90 %."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
        for (label, rows), colour in zip(lines.items(), (BLUE, ORANGE, GREEN, PURPLE), strict=False):
            low, middle, high = 100 * np.percentile(rows, (10, 50, 90), axis=0)
            ax.plot(x, middle, "o-", color=colour, linewidth=1.8, markersize=4, label=label)
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axvline(mark, color=GREY, linewidth=1, linestyle="--")
        ax.set_ylim(-2, 102)
        ax.set_xlabel(xlabel)
        ax.set_ylabel("%")
        ax.legend(frameon=False, fontsize=9)
        return _svg(figure)


def cross_slice(found: dict[str, dict]) -> bytes:
    """Cosine of slices of one volume minus that of slices of volumes of other patients, over their offset:
    a line a feature set of evaluate.shortcuts.cross_slice, with its 95 % interval.
    """
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
        for number, (name, of) in enumerate(found.items()):
            offsets, values, low, high = np.array(
                [
                    (d, *(v[k] for k in ("value", "low", "high")))
                    for d, v in zip(of["offsets"], of["difference"], strict=True)
                ],
                float,
            ).T  # None becomes NaN: not drawn
            colour, style = COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
            ax.plot(
                offsets, values, "o", linestyle=style, color=colour, linewidth=1.8, markersize=4, label=name
            )
            ax.fill_between(offsets, low, high, color=colour, alpha=0.15, linewidth=0)
        first = next(iter(found.values()))
        gap = f"; slices {first['gap_mm']:.3g} mm apart" if first["gap_mm"] else ""
        ax.set_title(f"Cross-slice consistency ({first['volumes']} volumes{gap})")
        ax.set_xticks(first["offsets"])
        ax.set_xlabel("offset in slices")
        ax.set_ylabel("cosine, within - across")
        ax.axhline(0, color=GREY, linewidth=1, linestyle="--")
        ax.legend(frameon=False, fontsize=9, bbox_to_anchor=(1, 1), loc="upper left")
        return _svg(figure)
