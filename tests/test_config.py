# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest

from vllm_roco.config import RocoConfig, blocks_of


def test_no_options_give_the_defaults() -> None:
    assert RocoConfig.from_additional_config({}) == RocoConfig()


@pytest.mark.parametrize("additional", [None, (), "roco", 512], ids=repr)
def test_additional_config_that_is_no_dictionary_holds_no_options(
    additional: object,
) -> None:
    assert RocoConfig.from_additional_config(additional) == RocoConfig()


def test_options_of_other_plugins_are_left_alone() -> None:
    config = RocoConfig.from_additional_config(
        {"other": {"budget": -1}, "roco": {"budget": 512}}
    )
    assert config == RocoConfig(budget=512)


def test_every_option_is_read() -> None:
    options: dict[str, Any] = {
        "policy": "recent",
        "mode": "full",
        "shield": "deviation",
        "shield_ratio": 0.25,
        "budget": 640,
        "stride": 64,
        "chunk": 128,
        "prefill_tokens": 1024,
        "turn_end_token_ids": (2, 7),
        "answer_start_token_ids": (1, 5, 1),
        "prefix_hits": "longest",
        "sink": 32,
        "recent": 48,
        "max_budget": 1280,
        "allow_full": True,
        "agree": False,
        "trace": "trace.jsonl",
    }
    assert options.keys() == {field.name for field in dataclasses.fields(RocoConfig)}
    config = RocoConfig.from_additional_config({"roco": options})
    assert dataclasses.asdict(config) == options


@pytest.mark.parametrize(
    ("options", "stride", "chunk"),
    [
        ({}, 256, 1024),
        ({"budget": 8192}, 256, 1024),
        ({"budget": 512}, 256, 512),
        ({"budget": 128}, 128, 128),
        ({"budget": 128, "stride": None, "chunk": None}, 128, 128),
        ({"budget": 128, "stride": 256, "chunk": 1024}, 256, 1024),
    ],
    ids=repr,
)
def test_what_is_left_out_follows_the_budget(
    options: dict[str, int | None], stride: int, chunk: int
) -> None:
    """A sequence with a budget of 128 tokens was read 512 tokens at a time."""
    config = RocoConfig.from_additional_config({"roco": options})
    assert (config.stride, config.chunk) == (stride, chunk)


@pytest.mark.parametrize(
    "value",
    [
        "x" * 100_000,
        # what Python does not print
        10**5000,
        functools.reduce(lambda inner, _: [inner], range(2000), []),
    ],
    ids=["long", "digits", "deep"],
)
@pytest.mark.parametrize("options", ["budget", "sink", "\ud800", None])
def test_a_value_of_any_size_is_one_short_error(
    options: str | None, value: object
) -> None:
    """A long one filled the log, and one too deep was a RecursionError."""
    with pytest.raises(ValueError, match="roco: ") as error:
        RocoConfig.from_additional_config(
            {"roco": value if options is None else {options: value}}
        )
    assert len(str(error.value).encode()) < 700


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RocoConfig().budget = 1  # type: ignore[misc]


@pytest.mark.parametrize("options", [None, 3, "budget", ["budget"]], ids=repr)
def test_options_that_are_no_dictionary_are_refused(options: object) -> None:
    message = f"additional_config['roco'] is {options!r}, but must be a dictionary"
    with pytest.raises(ValueError, match=re.escape(message)):
        RocoConfig.from_additional_config({"roco": options})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError) as error:
        RocoConfig.from_additional_config({"roco": {"buget": 512}})
    assert "unknown option 'buget' = 512" in str(error.value)
    assert "policy, mode, shield, shield_ratio, budget, stride" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("policy", "tova", '"roco" or "h2o" or "random" or "recent"'),
        ("policy", None, '"roco" or "h2o" or "random" or "recent"'),
        ("policy", ["roco"], '"roco" or "h2o" or "random" or "recent"'),
        ("mode", "prompts", '"both" or "prompt" or "generation" or "auto" or "full"'),
        ("mode", None, '"both" or "prompt"'),
        ("shield", "mean", '"contribution" or "peak" or "deviation"'),
        ("budget", 0, "a whole number of tokens, at least 1"),
        ("budget", -16, "a whole number of tokens, at least 1"),
        ("budget", 512.0, "a whole number of tokens, at least 1"),
        ("budget", "512", "a whole number of tokens, at least 1"),
        ("budget", True, "a whole number of tokens, at least 1"),
        ("stride", 0, "a whole number of tokens, at least 1"),
        ("chunk", 0, "a whole number of tokens, at least 1"),
        ("prefix_hits", "answers", '"exact" or "longest"'),
        (
            "turn_end_token_ids",
            2,
            "a list of token ids, or null for those of the model",
        ),
        ("turn_end_token_ids", [2, "<|im_end|>"], "a list of token ids"),
        ("turn_end_token_ids", [-1], "a list of token ids"),
        ("turn_end_token_ids", [2**31], "a list of token ids"),
        ("turn_end_token_ids", [True], "a list of token ids"),
        (
            "answer_start_token_ids",
            "<|im_start|>assistant",
            "a list of token ids, or null for those of the model",
        ),
        ("answer_start_token_ids", 1, "a list of token ids"),
        ("answer_start_token_ids", [1, None], "a list of token ids"),
        ("answer_start_token_ids", [1, -5], "a list of token ids"),
        ("answer_start_token_ids", [2**31], "a list of token ids"),
        ("answer_start_token_ids", [False], "a list of token ids"),
        ("answer_start_token_ids", [[1, 5]], "a list of token ids"),
        ("prefill_tokens", 0, "a whole number of tokens, at least 1"),
        ("sink", -1, "a whole number of tokens, at least 0"),
        ("recent", -1, "a whole number of tokens, at least 0"),
        ("budget", 2**31, "a whole number of tokens, at most 2147483647"),
        ("chunk", 10**30, "a whole number of tokens, at most 2147483647"),
        ("recent", None, "a whole number of tokens, at least 0"),
        ("max_budget", 2032, "a whole number of tokens, at least 2048"),
        ("max_budget", 4096.0, "a whole number of tokens, at least 2048"),
        ("max_budget", True, "a whole number of tokens, at least 2048"),
        ("allow_full", 1, "true or false"),
        ("allow_full", None, "true or false"),
        ("agree", 0, "true or false"),
        ("agree", "yes", "true or false"),
        ("shield_ratio", -0.01, "a number from 0 to 1"),
        ("shield_ratio", 1.01, "a number from 0 to 1"),
        ("shield_ratio", float("nan"), "a number from 0 to 1"),
        ("shield_ratio", "0.5", "a number from 0 to 1"),
        ("shield_ratio", True, "a number from 0 to 1"),
        ("trace", "", "a file path, or null for no trace"),
        ("trace", " ", "a file path, or null for no trace"),
        ("trace", True, "a file path, or null for no trace"),
    ],
)
def test_a_bad_value_is_refused_by_name(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        RocoConfig.from_additional_config({"roco": {key: value}})
    assert f"roco: {key} = {value!r} is not allowed. Use {allowed}" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"shield_ratio": 0},
        {"shield_ratio": 1},
        {"sink": 0, "recent": 0},
        {"budget": 64, "sink": 32, "recent": 32},
        {"budget": 1, "stride": 1, "chunk": 1, "sink": 0, "recent": 1},
    ],
    ids=repr,
)
def test_the_ends_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    RocoConfig(**options)


@pytest.mark.parametrize("key", ["turn_end_token_ids", "answer_start_token_ids"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ([], ()), ([0, 2**31 - 1, 0], (0, 2**31 - 1, 0))],
    ids=repr,
)
def test_token_ids_are_kept_in_order(
    key: str, value: list[int] | None, expected: tuple[int, ...] | None
) -> None:
    """As JSON has them; the options' hash needs a tuple."""
    config = RocoConfig.from_additional_config({"roco": {key: value}})
    assert getattr(config, key) == expected
    assert hash(config) == hash(RocoConfig(**{key: expected}))


def test_protected_tokens_must_fit_the_budget() -> None:
    with pytest.raises(ValueError) as error:
        RocoConfig(budget=64, sink=32, recent=33)
    assert "32 + 33 = 65 tokens, but must not exceed budget = 64" in str(error.value)


@pytest.mark.parametrize("mode", ["prompt", "full"])
def test_what_is_generated_is_kept_only_where_that_is_allowed(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode = '{mode}' keeps .* Set allow_full"):
        RocoConfig(mode=mode)
    assert RocoConfig(mode=mode, allow_full=True).mode == mode


def test_prompts_that_are_kept_need_room() -> None:
    with pytest.raises(ValueError, match=r"no prompt fits in max_budget = 512\. Raise"):
        RocoConfig(mode="generation", budget=512)
    assert RocoConfig(mode="generation", budget=512, max_budget=2048).budget == 512


@pytest.mark.parametrize(("asked", "most"), [(None, 512), (512, 512), (4096, 4096)])
def test_requests_may_keep_the_servers_budget_or_what_it_says(
    asked: int | None, most: int
) -> None:
    assert RocoConfig(budget=512, max_budget=asked).max_budget == most


def test_all_policies_but_the_newest_blocks_measure() -> None:
    for policy in ("roco", "h2o", "random"):
        assert RocoConfig(policy=policy).measures
    assert not RocoConfig(policy="recent").measures


@pytest.mark.parametrize(
    ("options", "block_size", "message"),
    [
        ({"budget": 2040}, 16, "budget = 2040 is not a multiple of the block size"),
        ({"budget": 2040}, 16, "Use 2032 or 2048, or another --block-size"),
        ({"stride": 8}, 16, "stride = 8 is not a multiple of the block size"),
        ({"stride": 8}, 16, "Use 16, or another --block-size"),
        ({"max_budget": 4090}, 16, "max_budget = 4090 is not a multiple of the block"),
        ({"chunk": 500}, 16, "Use 496 or 512, or another --block-size"),
        (
            {"budget": 64, "sink": 33, "recent": 17},
            32,
            "sink = 33 and recent = 17 protect 96 tokens",
        ),
    ],
)
def test_options_that_do_not_fit_the_blocks_are_refused(
    options: dict[str, int], block_size: int, message: str
) -> None:
    config = RocoConfig(**{"stride": 256, "chunk": 512, **options})
    with pytest.raises(ValueError, match=re.escape(message)):
        config.check_block_size(block_size)


def test_protected_tokens_may_fill_the_budget_to_the_last_block() -> None:
    config = RocoConfig(budget=64, stride=32, chunk=32, sink=17, recent=17)
    config.check_block_size(16)
    config.check_block_size(32)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_the_defaults_fit_every_supported_block_size(block_size: int) -> None:
    RocoConfig().check_block_size(block_size)


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_blocks_of_is_the_least_number_that_holds_the_tokens(block_size: int) -> None:
    for tokens in range(4 * block_size):
        blocks = blocks_of(tokens, block_size)
        assert blocks * block_size >= tokens
        assert (blocks - 1) * block_size < tokens


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("both", 64), ("auto", 64), ("generation", 256), ("prompt", None), ("full", None)],
)
def test_what_a_mode_keeps(mode: str, kept: int | None) -> None:
    config = RocoConfig(budget=64, max_budget=256, mode=mode, allow_full=True)
    assert config.most_kept == kept
