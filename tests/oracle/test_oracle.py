# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the oracle, against Hugging Face's own attention above all."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.oracle import Options, OracleResult, generate
from tests.oracle.options import Shield
from tests.oracle.victims import Block

# a large initializer range makes attention sharp and the generated tokens varied
_TINY: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.4,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
# not hidden_size / num_attention_heads
_WIDE_HEADS: dict[str, Any] = dict(head_dim=16)
_EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2)

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_TINY),
    "llama-mqa": LlamaConfig(**{**_TINY, "num_key_value_heads": 1}),
    "qwen2": Qwen2Config(**_TINY),
    "qwen3": Qwen3Config(**_TINY, **_WIDE_HEADS),
    "mistral": MistralConfig(**_TINY, sliding_window=None),
    "phi3": Phi3Config(**_TINY, original_max_position_embeddings=512),
    "mixtral": MixtralConfig(
        **_TINY, **_EXPERTS, num_local_experts=4, sliding_window=None
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **_TINY, **_EXPERTS, num_experts=4, moe_intermediate_size=24, **_WIDE_HEADS
    ),
    # as no published one is, without windows
    "gpt-oss": GptOssConfig(
        **_TINY,
        **_EXPERTS,
        **_WIDE_HEADS,
        num_local_experts=4,
        layer_types=["full_attention"] * _TINY["num_hidden_layers"],
    ),
}

# evicts in the prompt, several strides in one chunk, and again while generating
SMALL = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.5,
    budget=24,
    stride=8,
    chunk=20,
    sink=3,
    recent=6,
    block_size=4,
)
PROMPT_LENGTH = 70
NEW_TOKENS = 30


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> PreTrainedModel:
    """Builds a tiny random float32 model, the same one every time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def prompt(length: int = PROMPT_LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(97, (length,), generator=generator).tolist()


class TestAgainstHuggingFace:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_an_unreachable_budget_generates_what_hugging_face_generates(
        self, name: str
    ) -> None:
        model = build(name)
        options = dataclasses.replace(SMALL, budget=512)

        result = generate(model, prompt(), options, NEW_TOKENS)

        expected = model.generate(
            torch.tensor([prompt()]), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, PROMPT_LENGTH:]
        assert list(result.token_ids) == expected.tolist()
        assert len(set(result.token_ids)) > 5, "too monotonous a text to tell anything"
        assert result.evictions == ()
        assert result.peak_live_tokens == PROMPT_LENGTH + NEW_TOKENS - 1

    @pytest.mark.parametrize("shield", ["peak", "deviation"])
    @pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen3", "phi3", "gpt-oss"])
    def test_evictions_equal_one_masked_pass_over_the_whole_text(
        self, name: str, shield: Shield
    ) -> None:
        """Hugging Face's eager attention, told by a mask what each query may see.

        Its attention matrix holds every probability of the run, so the tokens and the
        scores of every eviction can be worked out anew from their definitions.
        """
        model = build(name)
        options = dataclasses.replace(SMALL, shield=shield)

        result = generate(model, prompt(), options, NEW_TOKENS)

        text = torch.tensor([prompt() + list(result.token_ids[:-1])])
        visible = visibility(result, options, text.shape[1])
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
        with torch.inference_mode():
            output = model(
                text, attention_mask=mask[None, None], output_attentions=True
            )
        best = output.logits[0, PROMPT_LENGTH - 1 :].topk(2)
        assert list(result.token_ids) == best.indices[:, 0].tolist()
        margins = best.values[:, 0] - best.values[:, 1]
        assert result.token_margins == pytest.approx(margins.tolist(), abs=1e-4)

        # E grows by 2 at 32, 40, 48, ... tokens; the prompt stops at 20, 40, 60 and 70
        assert [(x.num_computed_tokens, len(x.victims)) for x in result.evictions] == [
            *((40, 4), (60, 4), (70, 2)),
            *((72, 2), (80, 2), (88, 2), (96, 2)),
        ]
        # [layers, kv heads, group, queries, keys]
        attention = torch.cat(output.attentions).unflatten(
            1, (model.config.num_key_value_heads, -1)
        )
        for step in result.evictions:
            scores = brute_force_scores(
                attention, step.blocks, step.num_computed_tokens
            )
            for block, expected_scores in zip(step.blocks, scores, strict=True):
                actual = (block.mean, block.deviation, block.peak)
                assert actual == pytest.approx(expected_scores, rel=1e-3)

    def test_evicting_changes_the_text(self) -> None:
        """Otherwise the tests above could pass without any block going."""
        kept_all = generate(
            build("llama"), prompt(), dataclasses.replace(SMALL, budget=512), NEW_TOKENS
        )
        evicted = generate(build("llama"), prompt(), SMALL, NEW_TOKENS)
        assert kept_all.token_ids != evicted.token_ids

    def test_a_continuation_replays_the_same_run(self) -> None:
        model = build("llama")
        free = generate(model, prompt(), SMALL, NEW_TOKENS)
        forced = generate(
            model, prompt(), SMALL, NEW_TOKENS, continuation=free.token_ids
        )
        assert forced == free

    def test_a_continuation_is_read_in_place_of_the_own_choice(self) -> None:
        model = build("llama")
        options = dataclasses.replace(SMALL, budget=512)
        text = prompt(PROMPT_LENGTH + NEW_TOKENS - 1)

        result = generate(
            model,
            text[:PROMPT_LENGTH],
            options,
            NEW_TOKENS,
            continuation=text[PROMPT_LENGTH:],
        )

        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0, PROMPT_LENGTH - 1 :]
        assert list(result.token_ids) == logits.argmax(dim=-1).tolist()

    def test_the_models_own_attention_is_restored(self) -> None:
        model = build("llama")
        generate(model, prompt(5), SMALL, 1)
        assert model.config._attn_implementation == "eager"

    def test_sliding_windows_are_refused(self) -> None:
        torch.manual_seed(0)
        config = MistralConfig(**_TINY, sliding_window=8)
        model = AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(NotImplementedError, match="sliding_window=8"):
            generate(model, prompt(), SMALL, 1)

    def test_half_precision_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"torch\.bfloat16"):
            generate(build("llama").to(torch.bfloat16), prompt(), SMALL, 1)


def visibility(result: OracleResult, options: Options, length: int) -> torch.Tensor:
    """Returns which key each query may see, bool [length, length]."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    for step in result.evictions:
        for victim in step.victims:
            first = victim * options.block_size
            end = first + options.block_size
            visible[step.num_computed_tokens :, first:end] = False
    return visible


def brute_force_scores(
    attention: torch.Tensor, blocks: tuple[Block, ...], num_computed_tokens: int
) -> list[tuple[float, float, float]]:
    """Works out (M, D, P) of every block from the whole attention matrix in float64."""
    rows = attention.double().mean(dim=2).flatten(0, 1)
    shares = []
    for row in rows:
        looks = [
            row[
                SMALL.block_size * block.index : num_computed_tokens,
                SMALL.block_size * block.index : SMALL.block_size * (block.index + 1),
            ].sum(dim=1)
            for block in blocks
        ]
        statistics = torch.stack(
            [torch.stack([x.mean(), x.std(correction=0), x.max()]) for x in looks]
        )
        shares.append(statistics / statistics.sum(dim=0))
    return [tuple(x) for x in torch.stack(shares).amax(dim=0).tolist()]


class TestKeptBlocks:
    def test_recent_keeps_the_sinks_and_the_newest(self) -> None:
        """Blocks of 4, budget 24, stride 8, chunks of 20, one sink block.

        40 tokens fill 10 blocks, E = 4: blocks 1 to 4 go. 60 fill 15, E = 8: 5 to 8.
        70 fill 17, E = 10: 9 and 10. Then 2 more each time 8 tokens are complete.
        """
        options = dataclasses.replace(SMALL, policy="recent")
        result = generate(build("llama"), prompt(), options, NEW_TOKENS)
        kept = [(x.num_computed_tokens, x.kept_blocks) for x in result.evictions]
        assert kept == [
            (40, (0, *range(5, 10))),
            (60, (0, *range(9, 15))),
            (70, (0, *range(11, 17))),
            (72, (0, *range(13, 18))),
            (80, (0, *range(15, 20))),
            (88, (0, *range(17, 22))),
            (96, (0, *range(19, 24))),
        ]

    @pytest.mark.parametrize("shield", ["peak", "deviation"])
    def test_roco_always_keeps_sinks_recent_and_incoming_blocks(
        self, shield: Shield
    ) -> None:
        options = dataclasses.replace(SMALL, shield=shield)
        result = generate(build("qwen2"), prompt(), options, NEW_TOKENS)
        for step in result.evictions:
            end = step.num_computed_tokens
            incoming = range(6 + options.evicted_blocks(end), end // 4)
            recent = range((end - 6) // 4, end // 4)
            assert {0, *incoming, *recent} <= set(step.kept_blocks)

    def test_kept_blocks_carry_over(self) -> None:
        """A block once gone never comes back, and none vanishes without a trace."""
        result = generate(build("llama"), prompt(), SMALL, NEW_TOKENS)
        for earlier, later in itertools.pairwise(result.evictions):
            start, end = (
                earlier.num_computed_tokens // 4,
                later.num_computed_tokens // 4,
            )
            assert set(later.kept_blocks) | set(later.victims) == {
                *earlier.kept_blocks,
                *range(start, end),
            }

    def test_roco_and_recent_differ(self) -> None:
        """Otherwise the statistics would play no part in these tests."""
        recent = dataclasses.replace(SMALL, policy="recent")
        deviation = dataclasses.replace(SMALL, shield="deviation")
        kept = {
            tuple(
                step.kept_blocks
                for step in generate(build("llama"), prompt(), options, 5).evictions
            )
            for options in (SMALL, deviation, recent)
        }
        assert len(kept) == 3

    def test_a_block_counts_the_queries_that_saw_it(self) -> None:
        result = generate(build("llama"), prompt(), SMALL, NEW_TOKENS)
        for step in result.evictions:
            for block in step.blocks:
                first_position = block.index * SMALL.block_size
                assert block.queries_seen == step.num_computed_tokens - first_position

    def test_incoming_blocks_count_in_the_sums(self) -> None:
        """At 32 tokens E is 2: 0 to 4 are resident, 5 and 6 outgoing, 7 incoming."""
        options = dataclasses.replace(SMALL, budget=20, chunk=32, recent=0)
        result = generate(build("llama"), prompt(32), options, 1)
        (step,) = result.evictions
        assert [block.index for block in step.blocks] == list(range(8))
        assert 7 in step.kept_blocks
        assert len(step.victims) == 2

    @pytest.mark.parametrize("num_prompt_tokens", [31, 32, 33, 60, 70, 119])
    def test_live_tokens_stay_below_the_bound(self, num_prompt_tokens: int) -> None:
        result = generate(build("llama"), prompt(num_prompt_tokens), SMALL, NEW_TOKENS)
        bound = SMALL.budget + SMALL.stride
        assert result.peak_live_tokens < bound
        assert result.peak_attended_tokens < bound + SMALL.chunk
        # a chunk of 20 on top of all 20 tokens before it
        assert result.peak_attended_tokens >= min(num_prompt_tokens, 40)
