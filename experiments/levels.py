"""Draw README's picture: where the levels of RTN and of learned levels lie on the weights of one row.

python -m docs.levels        # from the project's root, writes docs/levels.png
"""

from pathlib import Path

from matplotlib.figure import Figure

from eval import TINY
from flexbcq import METHODS, FlexBCQLinear, levels
from llama import Checkpoint


def main() -> None:
    weight = Checkpoint(TINY).tensor("model.layers.2.mlp.down_proj.weight").float()
    kurtosis = ((weight - weight.mean(1, keepdim=True)) ** 4).mean(1) / weight.var(1) ** 2
    row = weight[kurtosis.argsort()[128]][None]  # a row with tails as heavy as most have
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = {"rtn": "uniform levels (RTN)", "bcq": "learned levels (BCQ, alternating update)"}
    for axes, (method, title), color in zip(panels, names.items(), ("#D55E00", "#0072B2")):
        layer = FlexBCQLinear(row, 3, -1, *METHODS[method])
        alpha, shift = layer.fold()[1:]
        error = ((layer.quantized_weight() - row).square().sum() / row.square().sum()).sqrt().item()
        axes.hist(row[0].numpy(), bins=60, color="0.75")
        for level in levels(alpha[0], shift).flatten().tolist():
            axes.axvline(level, color=color, linewidth=1.5)
        axes.set(title=f"{title}\nrelative error {error:.1%}", xlabel="weight")
    panels[0].set_ylabel("weights of one row")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
