# SPDX-License-Identifier: Apache-2.0
"""With which tokens answers begin, as chat templates have them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_roco.answer_start import answer_start_token_ids
from vllm_roco.config import RocoConfig
from vllm_roco.turn_ends import turn_end_token_ids

# SmolLM2's end token is <|im_end|>; all else that looks special here is text to it
EACH = "{% for message in messages %}"
USER = "{% if message['role'] == 'user' %}"
CONTENT = "{{ message['content'] }}"
MESSAGE = f"{{{{ message['role'] }}}}|>{CONTENT}<|im_end|>"
ASKS = "{% if add_generation_prompt %}"


def model_with(folder: Path, smollm2: Path, template: str | None) -> ModelConfig:
    """Return vLLM's configuration of SmolLM2 with another chat template."""
    for file in smollm2.iterdir():
        if file.name != "chat_template.jinja" and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ModelConfig(str(folder))


def found_in(model: ModelConfig, **options: Any) -> str:
    """Return the text of the tokens behind which answers begin, of whole tokens."""
    config = RocoConfig(**options)
    ids = answer_start_token_ids(config, model, turn_end_token_ids(config, model))
    assert isinstance(ids, tuple)
    tokenizer = cached_tokenizer_from_config(model)
    assert tokenizer is not None
    return tokenizer.decode(list(ids))


def test_the_models_own_template_tells(smollm2: Path) -> None:
    model = ModelConfig(str(smollm2))
    assert found_in(model) == "\n<|im_start|>assistant\n"
    assert turn_end_token_ids(RocoConfig(), model) == {2}
    config = RocoConfig()
    # the tokens, not only their text: a prompt's are compared with them
    assert answer_start_token_ids(config, model, {2}) == (198, 1, 520, 9531, 198)
    # also where none of them ends the question
    assert answer_start_token_ids(config, model, {99999}) == ()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(
            f"<s>{EACH}{USER}[INST] {CONTENT} [/INST]"
            f"{{% else %}} {CONTENT}<|im_end|>{{% endif %}}{{% endfor %}}",
            " [/INST]",
            id="no end token behind questions",
        ),
        pytest.param(
            f"<s>{EACH}<|{MESSAGE}{{% endfor %}}{ASKS}<|assistant|>{{% endif %}}",
            "<|assistant|>",
            id="an end token behind each message",
        ),
        pytest.param(
            f"{EACH}{USER}Q: {CONTENT}<|im_end|>Be<|im_end|>A:{{% else %}}"
            f"{CONTENT}<|im_end|>{{% endif %}}{{% endfor %}}",
            "A:",
            id="behind the last end token",
        ),
        pytest.param(
            f"{EACH}<|{MESSAGE}{{% endfor %}}{ASKS}<|assistant|><think>\n{{% endif %}}",
            "",
            id="a thought is begun that later prompts do not have",
        ),
        pytest.param(
            f"{EACH}<|{{{{ message['role'] }}}}|>"
            "{{ message['content'].split('</think>')[-1].lstrip() }}<|im_end|>"
            f"{{% endfor %}}{ASKS}<|assistant|>{{% endif %}}",
            "",
            id="what was thought is dropped",
        ),
        pytest.param(
            f"{EACH}<|{{{{ message['role'] }}}}|>\n\n{CONTENT}<|im_end|>"
            f"{{% endfor %}}{ASKS}<|assistant|>\n\n{{% endif %}}",
            "",
            id="the answer's first token takes the last of it",
        ),
        pytest.param(
            f"{EACH}{{{{ message['role'] }}}}: {CONTENT}\n{{% endfor %}}"
            f"{ASKS}assistant:{{% endif %}}",
            "",
            id="answers have no end token",
        ),
        pytest.param(
            f"{EACH}{USER}{{% if loop.last %}}Now{{% else %}}Then{{% endif %}}: "
            f"{CONTENT}<|im_end|><|assistant|>{{% else %}}{CONTENT}<|im_end|>"
            "{% endif %}{% endfor %}",
            "",
            id="a question is told in another way once it is answered",
        ),
        pytest.param(
            f"Write behind <|assistant|>: {EACH}{USER}{CONTENT}<|assistant|>"
            f"{{% else %}}{CONTENT}<|im_end|>{{% endif %}}{{% endfor %}}",
            "",
            id="something that is no answer begins like one",
        ),
        pytest.param(
            f"{EACH}{{% if loop.last %}}<|{MESSAGE}{{% endif %}}{{% endfor %}}"
            f"{ASKS}<|assistant|>{{% endif %}}",
            "",
            id="answers are left out",
        ),
        pytest.param(
            f"{EACH}{USER}{CONTENT}<|im_end|>{{% else %}}<|assistant|>{CONTENT}"
            "<|im_end|>{% endif %}{% endfor %}",
            "",
            id="nothing asks for an answer",
        ),
        pytest.param(
            f"{{{{ raise_exception('No.') }}}}{EACH}{{% endfor %}}", "", id="raises"
        ),
        pytest.param("{% for", "", id="no template of Jinja's"),
        pytest.param(None, "", id="no template"),
    ],
)
def test_a_template_tells(
    tmp_path: Path, smollm2: Path, template: str | None, expected: str
) -> None:
    model = model_with(tmp_path, smollm2, template)
    assert found_in(model) == expected


def test_nobody_tells_without_a_tokenizer(smollm2: Path) -> None:
    model = ModelConfig(str(smollm2), skip_tokenizer_init=True)
    assert answer_start_token_ids(RocoConfig(), model, {2}) == ()
    config = RocoConfig(answer_start_token_ids=(1, 520))
    assert answer_start_token_ids(config, model, {2}) == (1, 520)


def test_nobody_tells_with_a_broken_tokenizer(tmp_path: Path, smollm2: Path) -> None:
    model = model_with(tmp_path, smollm2, None)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    assert answer_start_token_ids(RocoConfig(), model, {2}) == ()


@pytest.mark.parametrize("given", [(5, 2, 8), ()])
def test_an_option_tells_first(smollm2: Path, given: tuple[int, ...]) -> None:
    """But where no turn ends an answer would have no end."""
    model = ModelConfig(str(smollm2))
    config = RocoConfig(answer_start_token_ids=given)
    assert answer_start_token_ids(config, model, {2}) == given
    assert answer_start_token_ids(config, model, ()) == ()
    # nor does a template's
    assert answer_start_token_ids(RocoConfig(), model, frozenset()) == ()
