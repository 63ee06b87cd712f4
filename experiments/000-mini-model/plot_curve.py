"""Draw the training curve of `mini`: losses, the norm spike at position 0, and attention to it.

python plot_curve.py [--curve FILE] [--out FILE]
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from train_model import HERE, SHAPE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve", type=Path, default=HERE / "curve.csv")
    parser.add_argument("--out", type=Path, default=HERE / "curve.png")
    args = parser.parse_args()

    with args.curve.open(newline="") as file:
        lines = list(csv.DictReader(file))
    curve = {name: [float(line[name]) for line in lines] for name in lines[0]}

    figure, (losses, ratios, attention) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    losses.plot(curve["step"], curve["loss"], label="held-out text")
    losses.plot(curve["step"], curve["loss_repeated"], label="repeated held-out passage")
    losses.set(title="Loss (nats per token)", ylim=(0, 6))
    losses.legend()
    draw_blocks(ratios, curve, "ratio")
    ratios.set(title="Norm at position 0 / median elsewhere", ylim=(0, None))
    ratios.legend(title="after block", ncols=2)
    draw_blocks(attention, curve, "attention")
    attention.set(title="Attention of the best head to position 0", ylim=(0, 1))
    attention.legend(title="block", ncols=2)
    for axes in (losses, ratios, attention):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "solid: contexts start with <|endoftext|>; dashed: contexts start anywhere in the text", fontsize=9
    )
    figure.savefig(args.out, dpi=120)


def draw_blocks(axes: Axes, curve: dict[str, list[float]], figure: str) -> None:
    """One colour per block, dashed for contexts without a leading `<|endoftext|>`."""
    for layer in range(SHAPE.n_layer):
        axes.plot(curve["step"], curve[f"{figure}_blocks.{layer}"], color=f"C{layer}", label=str(layer))
        axes.plot(curve["step"], curve[f"{figure}_blocks.{layer}_text"], color=f"C{layer}", linestyle="--", linewidth=1)


if __name__ == "__main__":
    main()
