"""Pictures of runs, with matplotlib where it is installed (extra `plots`); without it a line says what was left out."""

import importlib
import importlib.util
import json
import math
import textwrap
from pathlib import Path

import torch.nn.functional as F

from nano_adrpo import files
from nano_adrpo.errors import shown

NAMES = {"w2": "W2", "kl_k1": "KL k1", "kl_k3": "KL k3"}  # others are called as in metrics.jsonl
MEANING = {  # what an axis says of a metric beside its name
    "reward": "higher is better",
    "clip_diversity": "higher is more diverse",
    "pixel_diversity": "higher is more diverse",
    "w2": "to the reference, lower is nearer",
    "pass@1": "share of right answers, higher is better",
    "pass@8": "higher is better",
    "entropy": "nats per token, higher is more diverse",
    "kl_k1": "nats per token to the reference, lower is nearer",
    "kl_k3": "nats per token to the reference, lower is nearer",
    # of the demos' judges
    "joint": "share of right images, higher is better",
    **dict.fromkeys(["digits", "colours", "binding", "place"], "share of right images, higher is better"),
    **dict.fromkeys([f"joint/{kind}" for kind in ("colouring", "binding", "position", "unnamed")], "higher is better"),
    "frechet": "distance to real images, lower is nearer",
    "out_of_range": "share of pixels, lower is better",
    **dict.fromkeys(["style_entropy", "way_entropy"], "nats, higher is more diverse"),
}


def pyplot(file):
    """matplotlib's pyplot, or None and a line on the console. It is no dependency, hence the import by name."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{file}: left out, matplotlib is not installed (pip install matplotlib)")
        return None
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def grids(file, panels, labels, right=None, note=""):
    """Image grids side by side, of P rows with G images each.

    panels   {title: images [P·G, C, H, W] in [−1, 1], those of one row contiguous}
    labels   the rows' names, such as prompts, P texts
    note     a line below
    right    {title: booleans [P·G]}, None where a panel has none: draws a frame around each image of that panel, green where it
             is True and red where it is False
    """
    if not (plt := pyplot(file)):
        return
    right = {title: marks for title, marks in (right or {}).items() if marks is not None}
    first = next(iter(panels.values()))
    (channels, height, width), samples = first.shape[1:], len(first) // len(labels)
    cell, gap = 0.5 if height <= 32 else 1.3, max(1, height // 16)  # inches; pixels on each side of an image
    size = 2.5 + len(panels) * (samples * cell * width / height + 0.5), (cell + 0.05) * len(labels) + 0.5
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for column, (axis, (title, images)) in enumerate(zip(axes[0], panels.items())):
        grid = ((images.clamp(-1, 1) + 1) / 2).unflatten(0, (len(labels), -1))  # [P, G, C, H, W]
        grid = F.pad(grid, (gap, gap, gap, gap), value=float(channels > 1))  # white: grey is drawn reversed
        height, width = grid.shape[-2:]
        grid = grid.permute(0, 3, 1, 4, 2).reshape(len(labels) * height, -1, grid.shape[2])  # [P·H, G·W, C]
        axis.imshow(grid.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        letters = max(15, int(12 * samples * cell))  # a letter takes 1/12 inch
        axis.set_title(textwrap.fill(shown(title, 200), letters), fontsize=10, parse_math=False)
        axis.set_xticks([])
        axis.set_yticks(
            [height * (row + 0.5) for row in range(len(labels))] if column == 0 else [],
            [textwrap.fill(shown(label, 200), 36) for label in labels] if column == 0 else [],
            parse_math=False,  # a prompt with two dollars is no formula
        )
        for index, good in enumerate(right.get(title, [])):
            row, sample = divmod(index, samples)
            corner = sample * width + gap / 2 - 0.5, row * height + gap / 2 - 0.5  # imshow's first pixel is centred on 0
            color = "tab:green" if good else "tab:red"
            axis.add_patch(plt.Rectangle(corner, width - gap, height - gap, fill=False, edgecolor=color, linewidth=1.5))
    notes = [note, "green frame: the judge finds the image right; red: it does not" if right else ""]
    figure.supxlabel("; ".join(filter(None, notes)), fontsize=9)
    save(plt, figure, file)


def curves(file, metrics_file, diversity):
    """One panel per evaluated metric over the rounds, of held-out and of training prompts, and the reward against the metric
    named as `diversity`."""
    if not (plt := pyplot(file)):
        return
    rows = [row for row in read(metrics_file) if "eval" in row]
    # Those of a category or a share are too many. A judge may leave a metric out of some evaluations.
    names = [name for name in dict.fromkeys(name for row in rows for name in row["eval"]) if "/" not in name]
    columns = (len(names) + 2) // 2
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6), layout="constrained")
    for axis, name in zip(axes.flat, names):
        rounds = [row["round"] for row in rows]
        axis.plot(rounds, [row["eval"].get(name, math.nan) for row in rows], marker=".", label="held-out")
        if "eval_train" in rows[0]:
            axis.plot(rounds, [row["eval_train"].get(name, math.nan) for row in rows], "--", color="C0", label="training")
        axis.set_title(NAMES.get(name, name.replace("_", " ")), fontsize=10)
        axis.set_xlabel("round", fontsize=8)
        axis.set_ylabel(MEANING.get(name, "").replace(", ", "\n"), fontsize=8)
    if "eval_train" in rows[0]:
        axes.flat[0].legend(fontsize=8)
    trajectory(axes.flat[len(names)], [row["eval"] for row in rows], diversity, "reward", "C0")
    axes.flat[len(names)].locator_params(axis="x", nbins=4)
    axes.flat[len(names)].xaxis.label.set_fontsize(8)
    axes.flat[len(names)].yaxis.label.set_fontsize(8)
    for axis in axes.flat[len(names) + 1 :]:
        axis.set_axis_off()
    save(plt, figure, file)


def shares(file, metrics_file):
    """The judge's metrics named right/… and wrong/…, shares that add up to 1, as areas over the rounds: the right ones in
    greens, the wrong ones in greys. Draws nothing where there are none."""
    rows = [row for row in read(metrics_file) if "eval" in row]
    names = [name for kind in ("right/", "wrong/") for name in rows[0]["eval"] if name.startswith(kind)]
    if not names or not (plt := pyplot(file)):
        return
    right = sum(name.startswith("right/") for name in names)
    tones = [
        plt.get_cmap(map)(0.8 - 0.5 * i / max(1, n - 1))
        for map, n in (("Greens", right), ("Greys", len(names) - right))
        for i in range(n)
    ]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    areas = [[row["eval"].get(name, 0) for row in rows] for name in names]
    axis.stackplot([row["round"] for row in rows], areas, colors=tones, labels=[name.replace("/", ": ") for name in names])
    axis.set(
        xlabel="round",
        ylabel="share of the samples on held-out problems",
        ylim=(0, 1),
        xlim=(rows[0]["round"], rows[-1]["round"]),
    )
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )  # from the top, as drawn
    save(plt, figure, file)


def read(metrics_file):
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in Path(metrics_file).read_text(encoding="utf-8").splitlines()]


def pictures(rows, x, up, file):
    """The settings' mean trajectories, colored by method: a panel for each metric of `up` against the metric x.

    rows   see tables.row; the first word of a setting is its method, and the rest, its strength, stands at the end
    """
    if not (plt := pyplot(file)):
        return
    methods = list(dict.fromkeys(row["setting"].split()[0] for row in rows))
    strengths = [row["setting"].split(maxsplit=1)[-1] for row in rows]
    colors = [f"C{methods.index(row['setting'].split()[0])}" for row in rows]
    figure, axes = plt.subplots(1, len(up), figsize=(6.5 * len(up), 5.5), squeeze=False, layout="constrained")
    for axis, y in zip(axes[0], up):
        for row, color in zip(rows, colors):
            trajectory(axis, row["path"], x, y, color)
        if x in ("w2", "kl_k1") and max(row["path"][-1][x] for row in rows) > 0.1:  # they start at 0 and differ by magnitudes
            axis.set_xscale("symlog", linthresh=0.01)
        axis.margins(0.12)  # room for the strengths
    marks = [plt.Line2D([], [], color=f"C{i}", marker="*", markersize=11, linestyle="none") for i in range(len(methods))]
    figure.legend(marks, methods, loc="outside lower center", ncols=min(len(methods), 6))
    figure.canvas.draw()  # lays the panels out, so that places in pixels are known
    for axis, y in zip(axes[0], up):
        name_ends(axis, [(row["path"][-1][x], row["path"][-1][y]) for row in rows], strengths, colors)
    save(plt, figure, file)


def name_ends(axis, points, names, colors):
    """Writes a name beside each point, moved down until it covers no other name and no point, with a line back to its point."""
    renderer, ends, taken = axis.figure.canvas.get_renderer(), axis.transData.transform(points), []
    for point, name, color in sorted(zip(points, names, colors), key=lambda entry: -entry[0][1]):  # from the top
        text = axis.annotate(name, point, (8, 2), textcoords="offset points", fontsize=7, color=color)
        box = text.get_window_extent(renderer)  # in pixels
        while any(box.overlaps(other) for other in taken) or any(box.padded(5).contains(*end) for end in ends):
            text.set_position((8, text.get_position()[1] - 1))
            box = text.get_window_extent(renderer)
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.3, "shrinkA": 0, "shrinkB": 3}
        axis.annotate("", point, text.get_position(), textcoords="offset points", arrowprops=line)


def trajectory(axis, evaluations, x, y, color):
    """A run as the paper's Figure 3 draws it: transparent early, solid late, a star at the end."""
    for i, row in enumerate(evaluations):
        last = i == len(evaluations) - 1
        alpha = 0.15 + 0.85 * (i + 1) / len(evaluations)
        axis.scatter(row[x], row[y], color=color, alpha=alpha, marker="*" if last else ".", s=120 if last else 25)
    axis.plot([row[x] for row in evaluations], [row[y] for row in evaluations], color=color, alpha=0.25, linewidth=1)
    axis.set(xlabel=label(x), ylabel=label(y))


def label(metric):
    """An axis' label: the metric's name and, where it is known, which way is better."""
    name = NAMES.get(metric, metric.replace("_", " "))
    return f"{name} ({MEANING[metric]})" if metric in MEANING else name


def save(plt, figure, file):
    files.replace(file, lambda temporary: figure.savefig(temporary, dpi=100, bbox_inches="tight"))
    plt.close(figure)
