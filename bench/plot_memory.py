"""The picture of the README: what a request's KV cache takes as it grows, and what is in it.

`python -m bench.plot_memory` writes docs/images/memory.png from the code's own layouts.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from express_vllm.layout import Layout, layout_for
from express_vllm.shape import make_shape

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "memory.png"
#: Llama-3.1-8B in bfloat16: 32 layers, 8 KV heads, keys and values of 128.
BYTES_PER_TOKEN = 32 * 8 * 2 * 128 * 2
LONGEST, STEP = 8192, 16
#: Memory budget -> colour-blind safe colour.
BUDGETS = {2048: "#0072b2", 1024: "#009e73", 512: "#d55e00"}
SINKS, HEAVY, CORESET, RECENT = "#444444", "#e69f00", "#0072b2", "#999999"


def mebibytes(tokens: int) -> float:
    return tokens * BYTES_PER_TOKEN / 2**20


def draw_memory(axes: Axes) -> None:
    """MiB against tokens: exact attention, and each budget."""
    tokens = range(0, LONGEST + 1, STEP)
    axes.plot(tokens, [mebibytes(n) for n in tokens], color="#777777", linestyle="--")
    axes.annotate("exact attention", (5300, mebibytes(5300)), xytext=(-8, 4),
                  textcoords="offset points", ha="right")  # fmt: skip
    for budget, colour in BUDGETS.items():
        layout = layout_for(make_shape(budget))
        axes.plot(tokens, [mebibytes(layout.reserved(n)) for n in tokens], color=colour)
        label = f"budget of {budget:,} tokens: {mebibytes(budget):.0f} MiB"
        axes.annotate(label, (LONGEST, mebibytes(budget)), xytext=(-2, 4),
                      textcoords="offset points", ha="right", color=colour)  # fmt: skip
    axes.set_xlim(0, LONGEST)
    axes.set_ylim(0)
    axes.set_xticks(range(0, LONGEST + 1, 1024))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens of prompt and answer")
    axes.set_ylabel("KV cache of one request, MiB")
    axes.set_title("Llama-3.1-8B, bfloat16", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def parts(layout: Layout, tokens: int) -> list[tuple[str, str, int, float]]:
    """Label, colour, slots and opacity of each part of the cache, in order."""
    shape = layout.shape
    _, *coreset, recent = layout.segments(tokens)
    found = [("", SINKS, shape.sinks, 1.0), ("heavy hitters", HEAVY, shape.heavy, 0.8)]
    for rank, segment in enumerate(coreset):
        found.append((f"1 of {segment.weight}", CORESET, segment.length, 0.8 - 0.11 * rank))
    return [*found, ("recent tokens", RECENT, recent.length, 0.6)]


def draw_cache(axes: Axes, budget: int, tokens: int) -> None:
    """The strip of one layer's cache."""
    layout, left = layout_for(make_shape(budget)), 0
    for label, colour, slots, alpha in parts(layout, tokens):
        axes.barh(0, slots, left=left, color=colour, alpha=alpha, edgecolor="white", linewidth=0.8)
        if slots > budget // 20:  # wide enough for its label
            axes.text(left + slots / 2, 0, label, ha="center", va="center", fontsize=9)
        left += slots
    start, end = layout.shape.coreset_start, left - layout.segments(tokens)[-1].length
    axes.annotate("sinks", (2, -0.42), xytext=(0, -0.95), ha="left", va="center", fontsize=9,
                  arrowprops={"arrowstyle": "-", "linewidth": 0.7})  # fmt: skip
    axes.annotate("", (end, -0.62), xytext=(start, -0.62), arrowprops={"arrowstyle": "->"})
    note = "coreset, old to new: one token kept of so many"
    axes.text((start + end) / 2, -0.95, note, ha="center", va="center", fontsize=9)
    axes.set_xlim(0, left)
    axes.set_ylim(-1.15, 0.45)
    axes.set_axis_off()
    axes.set_title(
        f"What the cache of a budget of {budget:,} holds after {tokens:,} tokens",
        fontsize=10, loc="left",
    )  # fmt: skip


def main() -> None:
    plt.rcParams["font.size"] = 9
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 4.8), height_ratios=(3.4, 1), constrained_layout=True
    )
    draw_memory(above)
    draw_cache(below, 2048, LONGEST)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
