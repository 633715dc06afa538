# SPDX-License-Identifier: Apache-2.0
"""Launches kernels without what Triton works out anew on every call.

Steps outside CUDA graphs, those that read prompts, are launched layer by layer. Triton
looks at each of a kernel's thirty arguments to find the variant that was compiled for
them, which takes several times as long as the launch itself. Layers of a step differ in
some of the tensors alone, so all but the first launch as the first did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import torch
from typing_extensions import override

_dtype_of = attrgetter("dtype")


@dataclass(frozen=True)
class _Places:
    """Where a call's arguments are of which kind; `itemgetter` picks them out in C.

    Attributes:
        tensors: Returns all tensors of the arguments' values.
        numbers: Returns what is no tensor, without what varies from call to call.
        aligned: Returns the tensors whose address a variant is compiled for.
        of_tensors: Where the tensors are.
    """

    tensors: Callable[[Sequence[Any]], tuple[Any, ...]]
    numbers: Callable[[Sequence[Any]], tuple[Any, ...]]
    aligned: Callable[[Sequence[Any]], tuple[Any, ...]]
    of_tensors: Sequence[int]


class Launch:
    """A launch that has been made, to be made again with other tensors in some places.

    These have the dtype, shape, strides and alignment to 16 bytes of what they replace,
    which is not checked; `alike` tells it. The others must still be there: a launch
    knows their addresses alone.

    Args:
        run: Launches a variant on its grid.
        values: The arguments; tensors by their addresses, which spares the driver's
            question where they lie.
        names: Of the arguments.
    """

    def __init__(
        self, run: Callable[..., object], values: list[Any], names: Sequence[str]
    ) -> None:
        self._run = run
        self._values = values
        self._names = names

    def places(self, *names: str) -> tuple[int, ...]:
        """Return where arguments are, for `again`."""
        return tuple(map(self._names.index, names))

    def again(self, places: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        """Launch again.

        Args:
            places: As `places` returns them.
            tensors: What stands there now.
        """
        values = self._values
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor.data_ptr()
        self._run(*values)


class InterpretedLaunch(Launch):
    """A launch by Triton's interpreter, which takes tensors."""

    @override
    def again(self, places: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        for place, tensor in zip(places, tensors, strict=True):
            self._values[place] = tensor
        self._run(*self._values)


def alike(*tensors: torch.Tensor | None) -> tuple[object, ...]:
    """Return what tensors have in common that may replace each other in a launch."""
    return tuple(
        [
            None
            if each is None
            else (each.dtype, each.shape, each.stride(), each.data_ptr() % 16)
            for each in tensors
        ]
    )


class Launcher:
    """A kernel, and its variants by what they were compiled for.

    A variant is kept for every value of a number, so numbers that change from call to
    call belong in `do_not_specialize`; those must fit in 32 bits, which is not checked.
    Tensors of which an address may be anything belong in
    `do_not_specialize_on_alignment`.
    The tensors lie on the current device.

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
        self._places: dict[tuple[type, ...], _Places] = {}
        self._variants: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        options: Mapping[str, int | bool],
        **arguments: Any,
    ) -> Launch:
        """Launch the kernel, and return how to do so again.

        Args:
            grid: Programs in each dimension.
            options: Triton's, such as `num_warps`; the same names in every call.
            arguments: All of the kernel's arguments, in its order; a tensor first.
        """
        values = tuple(arguments.values())
        kinds = tuple(map(type, values))
        places = self._places.get(kinds)
        if places is None:
            # nothing is remembered of a call that is refused
            self._check_order(arguments)
            places = self._places[kinds] = self._sorted(arguments)
        key = (
            kinds,
            values[0].get_device(),
            *options.values(),
            places.numbers(values),
            *map(_dtype_of, places.tensors(values)),
            # Triton asks no more of a pointer
            *[tensor.data_ptr() % 16 == 0 for tensor in places.aligned(values)],
        )
        is_known = key in self._variants
        if not is_known:
            self._check_order(arguments)
            # the interpreter returns None
            self._variants[key] = self._kernel[grid](**arguments, **options)
        variant = self._variants[key]
        if variant is None:
            run = partial(self._kernel[grid], **options)
            if is_known:
                run(*values)
            return InterpretedLaunch(run, list(values), self._kernel.arg_names)
        run, addressed = variant[grid], list(values)
        for place in places.of_tensors:
            addressed[place] = addressed[place].data_ptr()
        if is_known:
            run(*addressed)
        return Launch(run, addressed, self._kernel.arg_names)

    def _check_order(self, arguments: Mapping[str, Any]) -> None:
        if list(arguments) != self._kernel.arg_names:
            raise TypeError(
                f"roco: {self._kernel.__name__} takes {self._kernel.arg_names}, "
                f"in this order, not {list(arguments)}."
            )

    def _sorted(self, arguments: Mapping[str, Any]) -> _Places:
        """Return where tensors and numbers are among a call's arguments."""
        tensors, numbers, aligned = [], [], []
        for place, (name, argument) in enumerate(arguments.items()):
            if isinstance(argument, torch.Tensor):
                tensors.append(place)
                if name not in self._unaligned:
                    aligned.append(place)
            elif name not in self._varying:
                numbers.append(place)
        return _Places(
            tensors=_getter(tensors),
            numbers=_getter(numbers),
            aligned=_getter(aligned),
            of_tensors=tensors,
        )


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what takes values at some places, always as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
