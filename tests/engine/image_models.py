# SPDX-License-Identifier: Apache-2.0
"""A random model that reads images, with all that makes tokens of them.

Idefics 3, because what prepares its images does without torchvision, which is not to be
had for every build of torch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
)

from tests.engine.tiny_models import CONFIGS, VOCABULARY

PATCH = 14
SIDE = 8
SPECIAL_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
NUM_WORDS = VOCABULARY - len(SPECIAL_TOKENS)
IMAGE_TOKEN = NUM_WORDS
NUM_IMAGE_TOKENS = SIDE**2 + 3
"""Tokens that stand for an image: its patches, and what frames them."""


def save_tiny_idefics3(folder: Path) -> Path:
    """Write a float32 model, the same one every time, as a Hugging Face folder."""
    pixels = SIDE * PATCH
    config = Idefics3Config(
        text_config=CONFIGS["llama"].to_dict(),
        vision_config=dict(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=pixels,
            patch_size=PATCH,
            initializer_range=0.2,
        ),
        image_token_id=IMAGE_TOKEN,
        scale_factor=1,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).float().save_pretrained(folder)
    words = [str(number) for number in range(NUM_WORDS)] + [*SPECIAL_TOKENS]
    tokenizer = Tokenizer(
        WordLevel({word: place for place, word in enumerate(words)}, unk_token="0")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            do_image_splitting=False,
            size={"longest_edge": pixels},
            max_image_size={"longest_edge": pixels},
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="0",
            additional_special_tokens=list(SPECIAL_TOKENS),
        ),
        image_seq_len=SIDE**2,
    ).save_pretrained(folder)
    return folder


def random_image(seed: int) -> Image.Image:
    """Return an image that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SIDE * PATCH, SIDE * PATCH, 3)
    noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy())
