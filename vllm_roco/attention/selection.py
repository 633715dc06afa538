# SPDX-License-Identifier: Apache-2.0
"""Which attention backend serves a layer of a model that is served with ROCO.

RoCo takes the layers with full attention. A layer with a sliding window keeps a bounded
cache by itself, so it gets what vLLM would choose for it if no backend was named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_roco.attention.backend import RocoBackend
from vllm_roco.validation import check_windows

if TYPE_CHECKING:
    from vllm.platforms.interface import DeviceCapability


def is_left_to_vllm(layer: AttentionSelectorConfig) -> bool:
    """Return whether another backend than RoCo's serves a layer.

    Args:
        layer: What vLLM's selector knows of it.

    Raises:
        NotImplementedError: The layer has a window, and so has every other one.
        ValueError: The layer has a window, and a setting of vLLM forbids to leave it
            to another backend.
    """
    if not layer.has_sliding_window or _is_of_a_kind_of_its_own(layer):
        return False
    check_windows(get_current_vllm_config())
    return True


def _is_of_a_kind_of_its_own(layer: AttentionSelectorConfig) -> bool:
    return layer.use_mla or layer.use_sparse or layer.attn_type != AttentionType.DECODER


class Chooser:
    """Stands for the backend class where vLLM's CUDA platform asks about one layer.

    The platform takes the class of the backend that the user named, asks it whether it
    can serve the layer, and then for its name, which is resolved anew. One that answers
    with the name of another class is a choice for each layer, without a patch. In
    everything else it is `RocoBackend`.
    """

    def __init__(self) -> None:
        self._name: tuple[str, str] = RocoBackend.full_cls_name()

    def __getattr__(self, name: str) -> Any:
        return getattr(RocoBackend, name)

    def validate_configuration(
        self, *, device_capability: DeviceCapability, **layer: Any
    ) -> list[str]:
        """Choose for a layer, and return the reasons against that choice.

        Args:
            device_capability: Of the GPU.
            layer: The fields of vLLM's `AttentionSelectorConfig`.
        """
        config = AttentionSelectorConfig(**layer)
        if not is_left_to_vllm(config):
            return RocoBackend.validate_configuration(
                device_capability=device_capability, **layer
            )
        # None stands for no choice of the user's
        path = current_platform.get_attn_backend_cls(None, config)  # type: ignore[arg-type]
        module, _, name = path.rpartition(".")
        self._name = module, name
        return []

    def full_cls_name(self) -> tuple[str, str]:
        """Return module and name of the class that was chosen."""
        return self._name


def __getattr__(name: str) -> Chooser:
    """Return a new chooser as `ROCO`: vLLM looks the name up for each kind of layer."""
    if name == "ROCO":
        return Chooser()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
