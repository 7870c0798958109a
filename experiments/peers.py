"""Our `--method gptq` against the package that people use: the error that both make in the output of the layers of one
block, on the inputs that the block has in the original model.

    pip install gptqmodel
    python -m experiments.peers FOLDER wiki.valid.tokens

gptqmodel is set as GPTQ is published, with the columns in order of their inputs' size (act order) and the scale of
each group fixed beforehand (static groups).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from calibrate import watching
from flexbcq import METHODS, FlexBCQLinear
from llama import linears, rope_tables
from support.checkpoint import Checkpoint
from support.command import guarded
from support.data import cut, load_tokenizer, read_text, tokenize


def by_gptqmodel(weight: Tensor, inputs: Tensor, bits: int, group_size: int) -> Tensor:
    """The quantized weight. weight: (out_features, in_features); inputs: (samples, seq_len, in_features)."""
    try:
        from gptqmodel.quantization import GPTQ, QuantizeConfig
    except ImportError as error:
        raise OSError(f"gptqmodel: {error}; pip install gptqmodel") from error
    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=False, desc_act=True, act_group_aware=False, static_groups=True,
        damp_percent=0.01,
    )  # fmt: skip
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.clone()
    peer = GPTQ(linear, config)
    peer.quantizer.configure(perchannel=True)
    for sample in inputs.split(1):
        peer.add_batch(sample, linear(sample).detach())
    return peer.quantize()[0].float()


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    # the block, and what it is fed with
    checkpoint = Checkpoint(args.model)
    ids = tokenize(load_tokenizer(args.model), read_text(args.text), str(args.text), args.seq_len)
    x, rope = checkpoint.embed(cut(ids, args.seq_len)[: args.samples]), rope_tables(checkpoint.config, args.seq_len)
    for i in range(args.block):
        x = checkpoint.block(i)(x, *rope)
    block, inputs = checkpoint.block(args.block), {}
    with watching(linears(block), inputs.__setitem__):
        block(x, *rope)

    # the error of each layer's output, in percent of the output
    print(f"{'block ' + str(args.block):20}{'rtn':>10}{'gptq':>10}{'gptqmodel':>12}")
    for name, linear in linears(block).items():
        weight, shape, tokens = linear.weight.detach(), (args.bits, args.group_size), inputs[name].flatten(0, 1)
        rtn = FlexBCQLinear(weight, *shape, *METHODS["rtn"])
        gptq = FlexBCQLinear(weight, *shape, *METHODS["rtn"], hessian=tokens.T @ tokens, n_passes=1)
        peer = by_gptqmodel(weight, inputs[name], *shape)

        output = tokens @ weight.T
        quantized = rtn.quantized_weight(), gptq.quantized_weight(), peer
        of_output = [(tokens @ w.T - output).norm() / output.norm() for w in quantized]
        print(f"{name:20}{of_output[0]:10.2%}{of_output[1]:10.2%}{of_output[2]:12.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare --method gptq with the package gptqmodel, layer by layer.")
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face folder of the original")
    add("text", type=Path, help="UTF-8 file")
    add("--block", type=int, default=3, help="(default: %(default)s)")
    add("--bits", type=int, default=3, help="(default: %(default)s)")
    add("--group-size", type=int, default=64, help="columns; -1: a row (default: %(default)s)")
    add("--samples", type=int, default=24, help="windows of the text (default: %(default)s)")
    add("--seq-len", type=int, default=512, help="tokens per window (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
