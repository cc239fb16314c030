"""Time of causal prefill attention against the prompt's length, from `bench.kernels`' results.

`python -m bench.plot_kernels [results.json]` writes bench/results/speed/kernels.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .record import RESULTS

#: Kernel -> line style, marker, grey and colour-blind safe colour: readable without colour too.
STYLES = {
    "FA2": (":", "o", "#777777"),
    "cuDNN": (":", "s", "#999999"),
    "FA3": ("--", "D", "#444444"),
    "Express lazy 1024": ("-", "^", "#56b4e9"),
    "Express lazy 2048": ("-", "v", "#0072b2"),
    "Express lazy 4096": ("-", "P", "#d55e00"),
}
LABELS = {
    "FA2": "FlashAttention 2 (torch)",
    "cuDNN": "cuDNN (torch)",
    "FA3": "FlashAttention 3 (vLLM)",
    "Express lazy 1024": "Express, 1,024 slots",
    "Express lazy 2048": "Express, 2,048 slots",
    "Express lazy 4096": "Express, 4,096 slots",
}


def series(rows: list[dict], kernel: str) -> tuple[list[int], list[float]]:
    points = sorted(
        (int(row["what"].split()[1]), row["ms"])
        for row in rows
        if row["kernel"] == kernel and row["what"].startswith("prefill ") and row["ms"] != "-"
    )
    return [n for n, _ in points], [ms for _, ms in points]


def draw(path: Path) -> None:
    results = json.loads(path.read_text())
    figure, axes = plt.subplots(figsize=(7.5, 5.2), constrained_layout=True)
    lengths: set[int] = set()
    for kernel, (line, marker, colour) in STYLES.items():
        x, y = series(results["rows"], kernel)
        if not x:
            continue
        lengths.update(x)
        axes.plot(x, y, line, marker=marker, color=colour, label=LABELS[kernel], linewidth=1.8)
        axes.annotate(
            f"{y[-1]:,.0f}" if y[-1] >= 10 else f"{y[-1]:.1f}",
            (x[-1], y[-1]), xytext=(7, -3), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(lengths)
    axes.set_xticks(ticks, [f"{n // 1024}K" if n < 1 << 20 else f"{n >> 20}M" for n in ticks])
    axes.set_xlim(right=1.55 * ticks[-1])
    axes.minorticks_off()
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("time of one layer's causal attention, ms")
    axes.set_title(
        "Prefill attention, compression included\n"
        f"32 query heads, 8 KV heads of 128, bf16, batch 1, {results['hardware']}",
        fontsize=10,
    )
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(RESULTS / "speed" / "kernels.png", dpi=150)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "speed" / "kernels.json")
