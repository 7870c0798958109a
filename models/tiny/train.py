"""Train the bundled Llama on Python's own source and write it as a Hugging Face folder.

    python -m models.tiny.train         # from the project's root

A byte-level BPE of 2,048 tokens, 5M parameters, AdamW for vectors and embeddings and Muon (Jordan et al. 2024) for
matrices, which needs about half of AdamW's steps. Text and the held-out split: `data.standard_library_text`.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama import Llama
from support.checkpoint import read_config, whole_file, write_config, write_tensors
from support.command import guarded
from support.data import cut, standard_library_text

FOLDER = Path(__file__).parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SEQ_LEN, BATCH, PEAK_RATE = 512, 4, 4e-3


def train_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE in the style of GPT-2, with every byte in its alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix (five Newton-Schulz steps, in float32)."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                x = p.grad.lerp(momentum.lerp_(p.grad, 0.05), 0.95)  # Nesterov
                x = x / x.norm()
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                for _ in range(5):  # pushes every singular value towards 1
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                size = 0.2 * max(p.shape) ** 0.5  # root mean square 0.2, as AdamW's
                p.mul_(1 - 0.1 * group["lr"]).sub_(x.T if tall else x, alpha=group["lr"] * size)


def initialize(model: Llama) -> None:
    """Normal(0.02); the two layers that write to the residual stream start smaller, by the number of layers."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            smaller = (
                math.sqrt(2 * CONFIG["num_hidden_layers"])
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 1
            )
            torch.nn.init.normal_(p, std=0.02 / smaller)


@torch.no_grad()
def held_out_perplexity(model: Llama, ids: torch.Tensor) -> float:
    losses = [F.cross_entropy(model(w[None])[0, :-1], w[1:]).item() for w in cut(ids, SEQ_LEN)]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2900, help=f"of {BATCH} x {SEQ_LEN} tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    guarded(run, parser)


def run(args: argparse.Namespace) -> None:
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: must be at least 1")
    torch.manual_seed(args.seed)
    text = standard_library_text(held_out=False)
    tokenizer = train_tokenizer(text)
    train_ids = torch.tensor(tokenizer.encode(text).ids)
    held_out_ids = torch.tensor(tokenizer.encode(standard_library_text(held_out=True)).ids)
    print(f"{len(train_ids):,} training tokens, {len(held_out_ids):,} held-out tokens")

    model = Llama(read_config(CONFIG))
    initialize(model)
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [model.model.embed_tokens.weight] + [p for p in model.parameters() if p.dim() == 1]
    optimizers = [Muon(matrices, PEAK_RATE), torch.optim.AdamW(others, PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0)]
    start = time.time()
    for step in range(1, args.steps + 1):
        rate = PEAK_RATE * min(step / 50, 1 - step / (args.steps + 1))  # a short warm-up, then linearly to zero
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = rate
        offsets = torch.randint(len(train_ids) - SEQ_LEN, (BATCH,)).tolist()
        batch = torch.stack([train_ids[o : o + SEQ_LEN + 1] for o in offsets])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
        if step % 1000 == 0 or step == args.steps:
            print(f"held-out perplexity {held_out_perplexity(model, held_out_ids):.3f}", flush=True)
            state = {name: p.to(torch.bfloat16) for name, p in model.state_dict().items() if name != "lm_head.weight"}
            with whole_file(FOLDER / "tokenizer.json") as temporary:  # they go together
                tokenizer.save(str(temporary))
            write_tensors(FOLDER / "model.safetensors", state)
            write_config(FOLDER, CONFIG)


if __name__ == "__main__":
    main()
