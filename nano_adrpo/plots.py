"""Pictures of runs, with matplotlib where it is installed (extra `plots`); without it a line says what was left out."""

import importlib
import importlib.util
import json
import textwrap
from pathlib import Path

import torch.nn.functional as F


def pyplot(file):
    """matplotlib's pyplot, or None and a line on the console. It is no dependency, hence the import by name."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{file}: left out, matplotlib is not installed (pip install matplotlib)")
        return None
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def grids(file, panels, prompts):
    """Image grids side by side: one row a prompt, its samples in columns.

    panels   {title: images [P·G, C, H, W] in [−1, 1], samples of one prompt contiguous}
    """
    if not (plt := pyplot(file)):
        return
    (channels, height, width), samples = next(iter(panels.values())).shape[1:], len(next(iter(panels.values()))) // len(prompts)
    cell = 0.5 if height <= 32 else 1.3  # inches
    size = 2.5 + len(panels) * (samples * cell * width / height + 0.5), (cell + 0.05) * len(prompts) + 0.5
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for column, (axis, (title, images)) in enumerate(zip(axes[0], panels.items())):
        grid = ((images.clamp(-1, 1) + 1) / 2).unflatten(0, (len(prompts), -1))  # [P, G, C, H, W]
        grid = F.pad(grid, (1, 1, 1, 1), value=float(channels > 1))  # a gap between neighbours, white: grey is drawn reversed
        height, width = grid.shape[-2:]
        grid = grid.permute(0, 3, 1, 4, 2).reshape(len(prompts) * height, -1, grid.shape[2])  # [P·H, G·W, C]
        axis.imshow(grid.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks(
            [height * (row + 0.5) for row in range(len(prompts))] if column == 0 else [],
            [textwrap.fill(prompt, 36) for prompt in prompts] if column == 0 else [],
        )
    save(plt, figure, file)


def curves(file, metrics_file, diversity):
    """One panel per evaluated metric over the rounds, and the reward against the metric named as `diversity`."""
    if not (plt := pyplot(file)):
        return
    rows = [json.loads(line) for line in Path(metrics_file).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "eval" in row]
    names = list(rows[0]["eval"])
    figure, axes = plt.subplots(2, (len(names) + 2) // 2, figsize=(2.6 * ((len(names) + 2) // 2), 5))
    for axis, name in zip(axes.flat, names):
        axis.plot([row["round"] for row in rows], [row["eval"][name] for row in rows], marker=".")
        axis.set(title=name, xlabel="round")
    trajectory(axes.flat[len(names)], [row["eval"] for row in rows], diversity, "reward", "C0")
    for axis in axes.flat[len(names) + 1 :]:
        axis.set_axis_off()
    save(plt, figure, file)


def trajectory(axis, evaluations, x, y, color):
    """A run as the paper's Figure 3 draws it: transparent early, solid late, a star at the end."""
    for i, row in enumerate(evaluations):
        last = i == len(evaluations) - 1
        alpha = 0.15 + 0.85 * (i + 1) / len(evaluations)
        axis.scatter(row[x], row[y], color=color, alpha=alpha, marker="*" if last else ".", s=120 if last else 25)
    axis.plot([row[x] for row in evaluations], [row[y] for row in evaluations], color=color, alpha=0.25, linewidth=1)
    axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))


def save(plt, figure, file):
    figure.tight_layout()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)
