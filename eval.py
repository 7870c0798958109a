"""Measure a checkpoint folder, original or packed: perplexity of a text, distance from the original (KL divergence,
share of positions with the same most likely token), text from a prompt with tokens per second, or accuracy in a task
(MMLU: support/tasks.py; BLiMP, LAMBADA, PIQA, ARC: support/cloze.py).

    python eval.py --model FOLDER --text wikitext2
    python eval.py --model PACKED --against FOLDER --text wikitext2
    python eval.py --model FOLDER --prompt "def fibonacci("
    python eval.py --model FOLDER --mmlu DATA --shots 5
    python eval.py --model FOLDER --task blimp

Perplexity follows the usual protocol (Frantar et al. 2023): the text is tokenized whole and cut into windows of seq_len
that do not overlap; in each, all tokens from the second on are predicted; the result is exp of the mean loss. It is
computed one decoder block at a time over all windows, in float32, so a model of any depth needs the memory of
one block and of the activations.
"""

if __name__ == "__main__":
    import support.interrupt  # noqa: F401 (from here on Ctrl-C is one line)

import argparse
import math
import time
from dataclasses import fields
from functools import partial
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from kernel import forced_path
from llama import Block, Llama, most_likely, rope_tables
from support import parallel
from support.chat import as_chat
from support.checkpoint import Checkpoint
from support.cloze import answer_items, mmlu_items, read_items
from support.command import check_device, guarded
from support.data import batches, cut, encode_prompt, load_text, load_tokenizer, resolve_seq_len, tokenize
from support.hub import model_folder
from support.settings import Evaluation, add_options, flag
from support.stack import stack_layers
from support.tasks import accuracy, load_model, subjects, table

BESIDE = {  # option -> those of which it needs one
    **dict.fromkeys(("tokens", "temperature", "chat"), ("prompt",)),
    "seed": ("temperature",),
    **dict.fromkeys(("cloze", "shots"), ("mmlu",)),
    "limit": ("task", "mmlu"),
}
AGAINST = {  # option -> those that make it void
    "text": ("prompt", "task", "mmlu"),
    "seq_len": ("prompt",),
    "shots": ("cloze",),
}


@torch.inference_mode()
def run_blocks(
    checkpoint: Checkpoint, windows: Tensor, device="cpu", prepare: Callable[[Block, int], None] | None = None, label=""
) -> Tensor:
    """All windows, (n_windows, seq_len) int64, through one block after the other: (n_windows, seq_len, hidden_size),
    float32 on the CPU. prepare: as in `perplexity`; label: of the progress bar."""
    cos, sin = rope_tables(checkpoint.config, windows.shape[1], device)
    x = checkpoint.embed(windows)

    n_blocks = checkpoint.config.num_hidden_layers
    for i in tqdm(range(n_blocks), desc=label, unit="block", leave=False):
        block = checkpoint.block(i, device=device)
        if prepare is not None:
            prepare(block, i)
        for part in batches(x):
            part.copy_(block(part.to(device), cos, sin))
    return x


def parts(windows: Tensor, *states: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few positions at a time, since logits are large: the token that follows each, and what predicts it.

    windows: (n_windows, seq_len); states: (n_windows, seq_len, hidden_size) -> (n,), (n, hidden_size) each"""
    for ids, *last in zip(windows, *states):
        yield from zip(ids[1:].split(256), *(x[:-1].split(256) for x in last))


@torch.inference_mode()
def perplexity(
    checkpoint: Checkpoint, windows: Tensor, device="cpu", prepare: Callable[[Block, int], None] | None = None, label=""
) -> float:
    """exp of the mean next-token loss. Several processes share the windows.

    windows: (n_windows, seq_len) int64
    prepare: called with each block and its number before it is used, for example to quantize it
    label: what the progress bar calls it
    Raises ValueError if the loss is not a number."""
    own, loss = parallel.share(windows), 0.0
    if len(own):
        x = run_blocks(checkpoint, own, device, prepare, f"perplexity {label}".strip())
        head = checkpoint.head(device=device)
        for wanted, part in parts(own, x):
            logits = head(part.to(device))  # (n, vocab_size)
            loss += F.cross_entropy(logits, wanted.to(device), reduction="sum").item()
    return exp_loss(checkpoint, parallel.total(loss) / windows[:, 1:].numel())


def exp_loss(checkpoint: Checkpoint, loss: float) -> float:
    """Perplexity from the mean loss. Raises ValueError if it is not a number."""
    if math.isnan(loss):
        raise ValueError(f"{checkpoint.folder}: the loss is not a number; do config.json and the weights fit together?")
    return math.exp(loss) if loss < 700 else math.inf


class Comparison(NamedTuple):
    """How far a model is from its original, over all positions of a text."""

    kl_mean: float  # of KL(original || model), in nats
    kl_99: float  # its 99th percentile
    same_token: float  # share of positions where both find the same token most likely
    perplexity: float
    perplexity_original: float


@torch.inference_mode()
def compare(checkpoint: Checkpoint, original: Checkpoint, windows: Tensor, device="cpu") -> Comparison:
    """Next-token distributions of a model against those of its original. windows: (n_windows, seq_len) int64

    Raises ValueError if their vocabularies differ in size or a loss is not a number."""
    if checkpoint.config.vocab_size != original.config.vocab_size:
        raise ValueError(f"{original.folder}: differs in vocabulary from {checkpoint.folder}; give its original")
    # the final hidden states of both, and their heads
    both = (checkpoint, original)
    states = [run_blocks(c, windows, device, label=c.folder.name) for c in both]
    heads = [c.head(device=device) for c in both]

    # a few positions at a time: divergence, agreement, losses
    kl, same, losses = [], 0, [0.0, 0.0]
    for wanted, *last in parts(windows, *states):
        log_q, log_p = (head(x.to(device)).log_softmax(-1) for head, x in zip(heads, last))  # (n, vocab_size)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        for i, log in enumerate((log_q, log_p)):
            losses[i] += F.nll_loss(log, wanted.to(device), reduction="sum").item()

    kl = torch.cat(kl).double()
    ours, theirs = (exp_loss(c, loss / len(kl)) for c, loss in zip(both, losses))
    kl_99 = kl.kthvalue(math.ceil(0.99 * len(kl))).values.item()
    return Comparison(kl.mean().item(), kl_99, same / len(kl), ours, theirs)


class Speed(NamedTuple):
    """How fast a prompt was continued."""

    tokens_per_second: float  # reading the prompt included
    gigabytes_per_second: float  # of weights; every token reads every weight once


def text_model(checkpoint: Checkpoint, device: torch.device) -> Llama:
    """The model as it writes text: in float32 on a CPU and in bfloat16 on a GPU, its layers stacked; embedding and head
    of a packed model are bfloat16 on a CPU too."""
    on_gpu, packed = device.type == "cuda", checkpoint.config.quantization is not None
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return stack_layers(checkpoint.model(dtype, device, head_dtype=torch.bfloat16 if packed else dtype))


def prompt_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer, settings: Evaluation) -> list[int]:
    """The prompt as tokens. Raises ValueError if there are none, or they and the continuation do not fit into the
    model's context."""
    if settings.chat:
        known = tokenizer.encode(as_chat(checkpoint.folder, settings.prompt), add_special_tokens=False).ids
    else:
        known = encode_prompt(tokenizer, settings.prompt)
    if not known:
        raise ValueError("--prompt: is empty; give at least one word")

    n_tokens, context = settings.tokens, checkpoint.config.max_position_embeddings
    if len(known) + n_tokens > context:
        raise ValueError(
            f"a prompt of {len(known)} tokens and {n_tokens} more do not fit into the context of {context}; "
            "shorten the prompt or give fewer --tokens"
        )
    return known


def generate(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    settings: Evaluation,
    device: torch.device,
    show: Callable[[str], None],
) -> Speed:
    """Continue the prompt until the text ends (at most --tokens): each token the likeliest, or drawn at a temperature.

    show: gets the prompt as it is given, then the continuation as it comes, in pieces of whole characters
    Raises ValueError as `prompt_tokens` does."""
    known = prompt_tokens(checkpoint, tokenizer, settings)
    ids = checkpoint.check_ids(torch.tensor([known], device=device))
    model = text_model(checkpoint, device)
    model.generate(ids, 2)  # warm up, the prompt and a single token; compiles the kernels if need be

    generator, tokens = torch.Generator(device).manual_seed(settings.seed), list(known)
    shown = len(tokenizer.decode(known))  # characters; what decoding adds behind them is the continuation

    def choose(logits: Tensor) -> Tensor:
        """The next token, (1, vocab_size) -> (1, 1), shown when it completes a character."""
        nonlocal shown
        new = most_likely(logits)
        if settings.temperature:  # of differences, so that no quotient is too large, nor 0 / 0
            p = ((logits.float() - logits.max()) / max(settings.temperature, 1e-30)).softmax(-1)
            new = torch.multinomial(p, 1, generator=generator)
        tokens.append(new.item())
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):
            show(text[shown:])
            shown = len(text)
        return new

    show(settings.prompt + "\n\n" * settings.chat)
    start = time.perf_counter()
    model.generate(ids, settings.tokens, checkpoint.eos_ids(), choose)
    speed = (len(tokens) - len(known)) / (time.perf_counter() - start)
    show(tokenizer.decode(tokens)[shown:])

    read = (model.model.layers, model.model.norm, model.lm_head)
    size = sum(t.nbytes for module in read for t in (*module.parameters(), *module.buffers()))
    return Speed(speed, size * speed / 1e9)


def answer(checkpoint: Checkpoint, tokenizer: Tokenizer, settings: Evaluation, seq_len: int, device) -> str:
    """The score in a task, as text. Raises OSError or ValueError for bad files."""
    if settings.task is not None or settings.cloze:
        mmlu, limit = settings.mmlu, settings.limit
        items = mmlu_items(mmlu, limit) if settings.task is None else read_items(settings.task, limit)
        return answer_items(checkpoint, load_model(checkpoint, device), tokenizer, items, seq_len)

    subjects(settings.mmlu)  # are there any?
    model = load_model(checkpoint, device)
    scores = accuracy(checkpoint, model, tokenizer, settings.mmlu, settings.shots, seq_len, settings.limit)
    return table(scores, settings.shots)


def run(settings: Evaluation) -> None:
    """Measure what was asked for and print it. Raises ValueError or OSError with one line."""
    given = {f.name for f in fields(Evaluation) if getattr(settings, f.name) != f.default}
    for name, others in BESIDE.items():
        if name in given and given.isdisjoint(others):
            raise ValueError(f"{flag(name)}: belongs to {' or '.join(map(flag, others))}; give that too")
    for name, others in AGAINST.items():
        for other in others:
            if {name, other} <= given:
                raise ValueError(f"{flag(name)}: means nothing with {flag(other)}; leave it out")
    if sum(x is not None for x in (settings.prompt, settings.task, settings.mmlu, settings.against)) > 1:
        raise ValueError("--prompt, --task, --mmlu and --against: give only one of them")
    forced_path()  # raises ValueError for a bad FLEXBCQ_KERNEL
    device = check_device(settings.device)
    checkpoint = Checkpoint(model_folder(settings.model))
    tokenizer = load_tokenizer(checkpoint.folder)

    if settings.prompt is not None:
        speed = generate(checkpoint, tokenizer, settings, device, partial(print, end="", flush=True))
        print(f"\n\n{speed.tokens_per_second:.1f} tokens/s, {speed.gigabytes_per_second:.1f} GB/s of weights")
        return

    seq_len = resolve_seq_len(settings.seq_len, checkpoint)
    if settings.task is not None or settings.mmlu is not None:
        print(answer(checkpoint, tokenizer, settings, seq_len, device))
        return

    text, name = load_text(settings.text, held_out=True)
    windows = cut(tokenize(tokenizer, text, name, seq_len), seq_len)
    if settings.against is not None:
        found = compare(checkpoint, Checkpoint(model_folder(settings.against)), windows, device)
        print(f"KL divergence {found.kl_mean:.4f} (99th percentile {found.kl_99:.3f}), ", end="")
        print(f"same most likely token {found.same_token:.2%}, original perplexity {found.perplexity_original:.4f}")
    result = found.perplexity if settings.against is not None else perplexity(checkpoint, windows, device)
    print(f"perplexity {result:.4f} ({name}, seq_len {seq_len}, {len(windows)} windows)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Perplexity of a checkpoint folder (original or packed), its distance from the original, text "
        "generated by it, or its score in a task."
    )
    add_options(parser, Evaluation)
    guarded(lambda args: run(Evaluation(**vars(args))), parser)


if __name__ == "__main__":
    main()
