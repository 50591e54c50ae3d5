"""Tiny pipelines with a tokenizer and a text encoder, in a folder as `save_pretrained` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.tiny_pipelines import WIDTH, wan

WORDS = ["<unk>", "<pad>", "a", "cat", "dog", "rain", "street", "sea", "train", "snow", "dancer", "kitchen", "horse"]


def saved(pipe: Any, folder: Path) -> Path:
    """The folder, written."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    pipe.register_modules(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"),
        text_encoder=UMT5EncoderModel(config).eval(),
    )
    pipe.save_pretrained(folder)
    return folder


def saved_wan(folder: Path) -> Path:
    return saved(wan(), folder)
