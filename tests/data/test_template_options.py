"""prompt.template_options: what a chat template is told beside the messages, in training and in evaluations.

Run: python -m pytest tests/data/test_template_options.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny import make_config

from nanolapo.config import Config, EvaluateConfig, PromptConfig, UserError
from nanolapo.config_file import load_config, to_yaml
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.evaluation.passes import parse_models

QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "Today: {{ date_string }}\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
HEAD = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def prompter(template: str = QWEN3, **settings: Any) -> Prompter:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Prompter(tokenizer, PromptConfig(**({"style": "chat", "instruction": ""} | settings)))


@pytest.mark.parametrize(
    ("options", "closed"),
    [({}, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")],
)  # fmt: skip
def test_options_reach_the_template_in_text_and_ids(options, closed):
    made = prompter(template_options=options)
    assert made.render("2+2?") == HEAD + closed
    expected = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], add_generation_prompt=True, return_dict=False, **options
    )
    assert made.ids("2+2?") == expected


def test_a_date_is_fixed_by_an_option():
    assert prompter(LLAMA3, template_options={"date_string": "26 Jul 2024"}).render("q") == "Today: 26 Jul 2024\nq"


def test_thinking_switched_off_and_a_prefix_that_opens_a_thought_contradict():
    with pytest.raises(UserError, match="just closed one"):
        prompter(template_options={"enable_thinking": False}, think_prefix="<think>")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_thinkng": False}, "template_options.enable_thinkng: .*did you mean enable_thinking"),
        ({"thinking_budget": 7}, "template_options.thinking_budget: the chat template .* does not read it"),
        ({"enable": 7}, "template_options.enable: the chat template .* does not read it"),
        ({"messages": []}, "template_options.messages is set by the trainer"),
        ({"add_generation_prompt": False}, "template_options.add_generation_prompt is set by the trainer"),
        ({"tokenize": True}, "template_options.tokenize is set by the trainer"),
        ({3: 1}, "template_options.3: the chat template .* does not read it"),
    ],
)
def test_an_option_that_would_do_nothing_or_break_the_prompt_is_refused(options, words):
    """jinja leaves a misspelt option unread without a word."""
    with pytest.raises(UserError, match=words):
        prompter(QWEN3, template_options=options)


def test_options_without_a_chat_template_are_refused():
    with pytest.raises(UserError, match="prompt.template_options is for prompt.style=chat"):
        prompter(style="raw", template="{question}", template_options={"enable_thinking": False})


def test_from_the_command_line_and_back(tmp_path):
    (tmp_path / "c.yaml").write_text("prompt: {style: chat, template_options: {date_string: 1 May}}\n")
    config = load_config(tmp_path / "c.yaml", ["prompt.template_options.enable_thinking=false"])
    assert config.prompt.template_options == {"date_string": "1 May", "enable_thinking": False}
    (tmp_path / "back.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "back.yaml") == config


def test_one_model_of_an_evaluation_has_its_own():
    """A model's options take the place of the others', so that a model without a chat template can have none."""
    prompts = {
        "b": {"template_options": {"enable_thinking": True}},
        "c": {"style": "raw", "template": "{question}", "template_options": {}},
    }
    chat = PromptConfig(style="chat", template_options={"enable_thinking": False, "date_string": "x"})
    config: Config = replace(
        make_config(), prompt=chat, evaluate=EvaluateConfig(models=("a=x", "b=y", "c=z"), prompts=prompts)
    )
    assert [m.prompt.template_options for m in parse_models(config)] == [
        {"enable_thinking": False, "date_string": "x"}, {"enable_thinking": True}, {}
    ]  # fmt: skip
