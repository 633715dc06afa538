# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from transformers.models.olmo3.modeling_olmo3 import Olmo3Model
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models.transformers.utils import can_enable_torch_compile

from tests.engine.mixed_models import save_mixed


def test_a_model_is_the_same_after_vllm_has_served_one_of_its_class(
    tmp_path: Path,
) -> None:
    """vLLM changes Transformers' classes for good, so order decided who failed."""
    before = save_mixed("olmo3", tmp_path / "before")
    # as vLLM does
    support_torch_compile(
        dynamic_arg_dims={"input_ids": 0}, enable_if=can_enable_torch_compile
    )(Olmo3Model)
    after = save_mixed("olmo3", tmp_path / "after")
    first, second = (load_file(path / "model.safetensors") for path in (before, after))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
