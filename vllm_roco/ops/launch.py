# SPDX-License-Identifier: Apache-2.0
"""Launches kernels without what Triton works out anew on every call.

Steps outside CUDA graphs, those that read prompts, are launched layer by layer. Triton
looks at each of a kernel's thirty arguments to find the variant that was compiled for
them, which takes several times as long as the launch itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Launcher:
    """A kernel, and its variants by what they were compiled for.

    A variant is kept for every value of a number, so numbers that change from call to
    call belong in `do_not_specialize`; those must fit in 32 bits, which is not checked.
    Tensors of which an address may be anything belong in
    `do_not_specialize_on_alignment`.
    A number is always an int or always a float: 0 and 0.0 are told apart by Triton, not
    here. The tensors lie on the current device.

    Args:
        kernel: A function under `triton.jit`.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        # the interpreter compiles nothing and has none
        self._varying = frozenset(getattr(kernel, "do_not_specialize", None) or ())
        self._unaligned = frozenset(
            getattr(kernel, "do_not_specialize_on_alignment", None) or ()
        )
        self._variants: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        options: Mapping[str, int | bool],
        **arguments: Any,
    ) -> None:
        """Launch the kernel.

        Args:
            grid: Programs in each dimension.
            options: Triton's, such as `num_warps`; the same names in every call.
            arguments: All of the kernel's arguments, in its order; a tensor first.
        """
        varying, unaligned = self._varying, self._unaligned
        key = (
            next(iter(arguments.values())).get_device(),
            *options.values(),
            *(
                # Triton asks no more of a pointer
                (argument.dtype, name in unaligned or argument.data_ptr() % 16 == 0)
                if isinstance(argument, torch.Tensor)
                else argument
                for name, argument in arguments.items()
                if name not in varying
            ),
        )
        variant = self._variants.get(key)
        if variant is None:
            if list(arguments) != self._kernel.arg_names:
                raise TypeError(
                    f"roco: {self._kernel.__name__} takes {self._kernel.arg_names}, "
                    f"in this order, not {list(arguments)}."
                )
            # the interpreter returns None
            self._variants[key] = self._kernel[grid](**arguments, **options)
        else:
            variant[grid](*arguments.values())
