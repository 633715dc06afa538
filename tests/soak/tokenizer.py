# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of the repository's own text, for hosts that have no other."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DOCUMENTS = Path(__file__).parents[2] / "docs"
VOCABULARY = 4096
"""Tokens at most; prompts are made of those from the thousandth on."""


def save_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer, the same one for the same pages.

    Args:
        folder: Where to; it is made.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        # their places are those of a Llama's configuration
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # without what takes several bytes: every token but those of one byte is whole
    pages = (
        page.read_text(encoding="utf-8") for page in sorted(DOCUMENTS.glob("*.md"))
    )
    texts = (page.encode("ascii", "ignore").decode() for page in pages)
    tokenizer.train_from_iterator(texts, trainer)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    whole.save_pretrained(folder)
    return folder
