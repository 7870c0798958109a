"""A small random Llama in a Hugging Face folder, written by `transformers`, and texts to go with it."""

import os
import shutil
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported; test_hub.py has a server of its own

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.settings import TINY

# a shell starts a command in the background (`pytest &`) with Ctrl-C ignored, and all that it starts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """Two blocks, hidden size 64, context 64, bf16, with the tokenizer of the bundled model."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A UTF-8 file of a few thousand tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(Path(__file__).with_name("test_flexbcq.py").read_text("utf-8"), "utf-8")
    return path
