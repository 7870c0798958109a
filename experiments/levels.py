"""Draw the README's picture: the levels of three methods among the weights of one row, and which weight takes which.

    python -m experiments.levels        # writes docs/levels.png, about a minute

One layer of the bundled model, 2 bits, a row a group; flexbcq is trained on the inputs that the layer sees there.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from calibrate import Activations, first_activations, run_block, train_block
from experiments.page import ROOT
from flexbcq import METHODS, FlexBCQLinear, levels
from support.checkpoint import Checkpoint
from support.data import load_texts
from support.settings import TINY, Settings

PANELS = {  # method -> title, colour
    "rtn": ("uniform (RTN): evenly spaced levels", "#D55E00"),
    "bcq": ("BCQ: levels where the weights are", "#009E73"),
    "flexbcq": ("FlexBCQ: levels and mapping learned", "#0072B2"),
}


@torch.inference_mode()
def layer_inputs(checkpoint: Checkpoint, settings: Settings) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What down_proj of block 2 sees in the original model, (samples, seq_len, in_features), and the RoPE tables."""
    seen = []
    x = first_activations(checkpoint, load_texts(checkpoint, settings)[0], settings)
    for i in range(3):
        block = checkpoint.block(i)
        if i == 2:
            block.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        run_block(block, x.original, x.rope, out=x.original)
    return torch.cat(seen), x.rope


def main() -> None:
    torch.manual_seed(0)
    checkpoint = Checkpoint(TINY)
    settings = Settings(samples=48, seq_len=256, eval_seq_len=256, epochs=4, batch_size=1, device="cpu")
    inputs, rope = layer_inputs(checkpoint, settings)
    train, test = inputs.clone().split((40, 8))

    weight = checkpoint.tensor("model.layers.2.mlp.down_proj.weight").float()
    kurtosis = ((weight - weight.mean(1, keepdim=True)) ** 4).mean(1) / weight.var(1) ** 2
    row = kurtosis.argsort()[len(weight) // 2]  # a row with tails as heavy as most have

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (method, (title, color)) in zip(figure.subplots(1, 3, sharey=True), PANELS.items()):
        importance = train.square().sum((0, 1))
        layer = FlexBCQLinear(weight, 2, -1, *METHODS[method], importance=importance)
        if method == "flexbcq":
            x = Activations(train, train, train @ weight.T, rope)
            train_block(lambda x, *rope, layer=layer: layer(x), [layer], x, settings, seed=0)
        with torch.no_grad():
            error = (layer(test) - test @ weight.T).square().sum() / (test @ weight.T).square().sum()

        # weights of neighbouring levels in two shades
        ranks = layer.ranks()[row]
        by_rank = [weight[row][ranks == rank].numpy() for rank in range(4)]
        axes.hist(by_rank, bins=80, stacked=True, color=["0.45", "0.78"] * 2)

        _, alpha, shift = layer.fold()
        for level in levels(alpha[row], shift[row, :, None]).flatten().tolist():
            axes.axvline(level, color=color, linewidth=1.5)
        axes.set(title=f"{title}\noutput error of the layer {error:.1%}", xlabel="weight")
    figure.axes[0].set_ylabel("weights of one row")
    figure.savefig(ROOT / "docs" / "levels.png", dpi=110)


if __name__ == "__main__":
    main()
