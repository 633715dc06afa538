# SPDX-License-Identifier: Apache-2.0
"""What `vllm_roco.verify` runs on a GPU finds nothing wrong, and finds what is."""

from __future__ import annotations

import pytest
import torch

from vllm_roco import kernel_check
from vllm_roco.ops.decode.attention import decode_attention


@pytest.mark.parametrize("name", kernel_check.CHECKS)
def test_kernels_pass(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    kernel_check.CHECKS[name](device, torch.float32)


def test_a_wrong_kernel_is_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_scale(**arguments: object) -> None:
        decode_attention(**{**arguments, "scale": 1.0})  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_check, "decode_attention", wrong_scale)
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="the output errs by"):
        kernel_check.check_decode(device, torch.float32)
