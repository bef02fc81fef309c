"""Builds every prompt of the model: the paper's template, chat templates, guidance forms, rivals' sentences.

One `Prompter`, built from (tokenizer, config.prompt), serves training, both samplers and evaluation, so that
they cannot disagree on a system prompt, a <think> tag or a start token. It makes token ids once.
Completions never pass through it, and prompts are never cut.

Where guidance goes:      raw style                                chat style
  outside (before <think>)  at the end of the question               at the end of the user turn
  inside (after <think>)    at the end of the template               after the think prefix

Inside guidance needs an open thought: a template that ends in <think>, or a think prefix. A prompt that would put it
before the thought (the model opens it) or behind it (thinking is switched off) is refused. A model that knows no such tag
thinks in its answer, so inside guidance becomes the first words of the answer.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from inspect import signature
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from nanolapo.config import PromptConfig, UserError
from nanolapo.grader.boxes import THOUGHT_TAG
from nanolapo.lengths import to_multiple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GivenTokens:
    """What an answer is made to begin with. It belongs to the answer: it counts in the length and is trained."""

    ids: tuple[int, ...]
    logprob: float | None  # of each, if chosen by lot: log 0.5 if half of a group begins so. None: the policy's own


@dataclass(frozen=True)
class Guidance:
    """What a method adds to one prompt."""

    outside: str = ""  # end of the question, before thinking starts
    inside: str = ""  # first words of the model's own thought
    inside_is_answer: bool = False  # True: these words are given tokens of the answer, not the end of the prompt
    budget: float | None = None  # target length in tokens for the reward; None: this prompt has no budget
    given: GivenTokens | None = None  # how the answer begins; None: the model draws every token

    def __post_init__(self) -> None:
        # A missing length stored as 0 would teach the model to answer with nothing.
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget >= 1):
            raise ValueError(f"budget {self.budget}: a length is at least 1 token, and no budget is None")


NO_GUIDANCE = Guidance()


# The guidance forms. Lengths are printed rounded; a method that wants another number rounds it itself.


def exact_guidance(n: float) -> Guidance:
    """The paper's stage-2 sentence.

    >>> exact_guidance(1300).inside
    ' I will answer the question with 1300 tokens.'
    """
    return Guidance(inside=f" I will answer the question with {n:.0f} tokens.", budget=n)


def range_guidance(low: float, high: float, n: float) -> Guidance:
    """An interval in the thought; the reward still aims at n. The wording is ours: the paper prints none."""
    return Guidance(inside=f" I will answer the question with {low:.0f} to {high:.0f} tokens.", budget=n)


def outside_guidance(n: float) -> Guidance:
    """Ask for the length in the question. The sentence is L1-Exact's; to use it as LAPO's Outside form is ours."""
    return Guidance(outside=f" Think for {n:.0f} tokens.", budget=n)


def implicit_guidance(n: float) -> Guidance:
    """State no length; only the reward uses it."""
    return Guidance(budget=n)


# Rivals' budget sentences, word for word.


def l1_max_guidance(n: float) -> Guidance:
    """L1-Max: an upper limit."""
    return Guidance(outside=f" Think for maximum {n:.0f} tokens.", budget=n)


def thinkprune_guidance(n: float) -> Guidance:
    """ThinkPrune: the generation limit, in words. Simplified: it ends the question; theirs ends the system prompt."""
    return Guidance(outside=f" The output of the assistant should be within {n:.0f} tokens.", budget=n)


def curriculum_guidance(n: float) -> Guidance:
    """Train Long, Think Short: the budget of the current step."""
    return Guidance(outside=f" IMPORTANT: You should use exactly {n:.0f} tokens in your response.", budget=n)


def hbpo_guidance(n: float) -> Guidance:
    """HBPO as its paper words it (its code says "with", which is `exact_guidance`)."""
    return Guidance(inside=f" I will answer the question within {n:.0f} tokens.", budget=n)


class Prompter:
    """Turns questions into prompts: `render` gives text for people, `ids` token ids for models."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        if config.style == "raw":
            if config.template.count("{question}") != 1:
                raise UserError("prompt.template must contain {question} exactly once")
            if config.system:
                raise UserError("prompt.system is for prompt.style=chat; for raw, write it into prompt.template")
            if config.template_options:
                raise UserError("prompt.template_options is for prompt.style=chat; for raw, set it to {}")
        elif not tokenizer.chat_template:
            name = tokenizer.name_or_path
            raise UserError(f"prompt.style=chat: {name!r} has no chat template; use prompt.style=raw")
        else:
            check_template_options(tokenizer, config.template_options)
        # The BOS token, if this tokenizer starts every text with it. (Having one is not enough: ChatML models name
        # <|im_start|> their BOS and put it before every turn, never at the start of plain text.)
        bos, first = tokenizer.bos_token_id, tokenizer("a")["input_ids"][:1]
        self.bos_id: int | None = bos if bos is not None and first == [bos] else None
        self.prefix = self._think_prefix() if config.style == "chat" else ""
        self.before, self.opening = self._around_question()
        template = config.template if config.style == "raw" else tokenizer.chat_template
        self.knows_thoughts = bool(THOUGHT_TAG.search(f"{template} {[*tokenizer.get_added_vocab()]}{self.opening}"))

    def render(self, question: str, guidance: Guidance = NO_GUIDANCE) -> str:
        """Return the prompt as text, to show it; models get `ids`. Raises UserError if guidance would be misplaced."""
        return "".join(self._parts(question, guidance))

    def shown(self, question: str, guidance: Guidance, reader: str) -> str:
        """Return the prompt's ids as text, for --dry-run: what `reader` (a model) sees, which `render` only intends."""
        ids = self.ids(question, guidance)
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return f"one prompt, as {reader} sees it ({len(ids)} ids, decoded):\n---\n{text}\n---"

    def ids(self, question: str, guidance: Guidance = NO_GUIDANCE) -> list[int]:
        """Return the prompt's token ids, with exactly one BOS in front where the tokenizer starts texts with one."""
        head, opening = self._parts(question, guidance)
        # A chat template is tokenized as one piece (as everywhere else), and the thought's opening after it.
        pieces = [head + opening] if self.config.style == "raw" else [head, opening]
        ids = [token for piece in pieces for token in self._encode(piece)]
        if self.bos_id is None:
            return ids
        num_bos = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[num_bos:]]

    def ids_and_given(self, question: str, guidance: Guidance) -> tuple[list[int], GivenTokens | None]:
        """Return the prompt's ids, and what the answer is made to begin with."""
        if not guidance.inside_is_answer:
            return self.ids(question, guidance), guidance.given
        ids = self.ids(question, guidance)
        shared = len(commonprefix([ids, self.ids(question, replace(guidance, inside=""))]))
        return ids[:shared], GivenTokens(tuple(ids[shared:]), None)

    def placed(self, guidance: Guidance) -> Guidance:
        """Return the guidance as it is printed. Raises UserError if it would not stand where the method wants it."""
        opened = thought_is_open(self.opening)
        if guidance.outside and thought_is_open(self.before) and not opened:
            raise UserError(
                f"prompt: {guidance.outside.strip()!r} belongs before the thought, but the question stands in the thought; "
                "open the thought after the question"
            )
        if guidance.inside and self.knows_thoughts and not opened:
            raw = self.config.style == "raw"
            key = "end prompt.template in <think>" if raw else 'set prompt.think_prefix="<think>"'
            raise UserError(
                f"prompt: {guidance.inside.strip()!r} belongs into the thought, but none is open where the answer begins "
                f"({self.opening[-40:]!r}); {key} (thinking must not be switched off), or state lengths in the question "
                "(lapo.guidance=outside, evaluate.instructions outside:N)"
            )
        return self.printed(guidance)

    def printed(self, guidance: Guidance) -> Guidance:
        """Return the guidance with its lengths as multiples of prompt.length_multiple; the budget stays as it is."""
        m, texts = self.config.length_multiple, (guidance.outside, guidance.inside)
        outside, inside = (re.sub(r"\d+", lambda length: str(to_multiple(int(length[0]), m)), text) for text in texts)
        return replace(guidance, outside=outside, inside=inside) if m > 1 else guidance

    def _raw(self, question: str, guidance: Guidance) -> str:
        # Not str.format: questions and the template's \boxed{} are full of braces.
        return self.config.template.replace("{question}", question + guidance.outside)

    def _messages(self, question: str, guidance: Guidance) -> list[dict[str, str]]:
        instruction = self.config.instruction
        if "{question}" in instruction:
            turn = instruction.replace("{question}", question)
        else:
            turn = f"{question} {instruction}" if instruction else question
        user = {"role": "user", "content": turn + guidance.outside}
        return [{"role": "system", "content": self.config.system}, user] if self.config.system else [user]

    def _chat(self, question: str, guidance: Guidance) -> str:
        return self._apply(self._messages(question, guidance), add_generation_prompt=True)

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self.config.template_options
            )
        except (TemplateError, TypeError, ValueError) as error:  # the template is a program of somebody else's
            name, remedy = self.tokenizer.name_or_path, "mend it, or give a system prompt (prompt.system)"
            remedy = 'try prompt.system=""' if self.config.system else remedy
            raise UserError(f"the chat template of {name!r} refuses this prompt ({error}); {remedy}") from error
        assert isinstance(text, str)
        return text

    def closing(self) -> str:
        """Return what the chat template writes after an assistant's answer ("<|im_end|>\\n"), "" in raw style and for a
        template that takes no answers."""
        if self.config.style == "raw":
            return ""
        answer = "The answer is 7."
        turns = [*self._messages("What is 3+4?", NO_GUIDANCE), {"role": "assistant", "content": answer}]
        try:
            _, found, closing = self._apply(turns, add_generation_prompt=False).rpartition(answer)
        except UserError:
            return ""
        return closing if found else ""

    def _around_question(self) -> tuple[str, str]:
        """Return the template's text before the question (raw style), and what opens the answer: all after the question
        (raw style) or after the user's turn."""
        if self.config.style == "raw":
            before, _, after = self.config.template.partition("{question}")
            return before, after
        question = "What is 3+4?"
        turn = self._messages(question, NO_GUIDANCE)[-1]["content"].strip()
        return "", self._chat(question, NO_GUIDANCE).rpartition(turn)[2] + self.prefix

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _parts(self, question: str, guidance: Guidance) -> tuple[str, str]:
        """Return the template's text, and what follows it: the think prefix and the guidance."""
        guidance = self.placed(guidance)
        head = (self._raw if self.config.style == "raw" else self._chat)(question, guidance)
        return head, self.prefix + _after(head + self.prefix, guidance.inside)

    def _think_prefix(self) -> str:
        """Return config.think_prefix without what the chat template itself writes."""
        head = self._chat("", NO_GUIDANCE)
        prefix = self.config.think_prefix
        if "<think>" in prefix and head.rstrip().endswith("</think>"):
            raise UserError("prompt.think_prefix opens a thought, but the chat template has just closed one (thinking is "
                            'switched off in it); set prompt.think_prefix=""')  # fmt: skip
        if head.rstrip().endswith("<think>"):  # as DeepSeek-R1 and QwQ do; a second tag would be off-policy
            prefix = prefix.rpartition("<think>")[2]
        return _after(head, prefix)


def check_template_options(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    """Refuse an option that the chat template does not name, because jinja would leave it unread without a word."""
    ours = {"messages", *signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
    words = set(re.findall(r"\w+", tokenizer.get_chat_template()))
    for name in map(str, options):
        if name in ours:
            raise UserError(f"prompt.template_options.{name} is set by the trainer; leave it out")
        if name not in words:
            close = difflib.get_close_matches(name, words - ours, n=1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise UserError(f"prompt.template_options.{name}: the chat template of {tokenizer.name_or_path!r} does not "
                            f"read it; {hint}")  # fmt: skip


def thought_is_open(text: str) -> bool:
    """Return True if the last thought tag in `text` opens a thought.

    >>> [thought_is_open(text) for text in ("<think> 1 </think> A: <think>\\n", "<think>\\n\\n</think>\\n", "[THINK]", "")]
    [True, False, True, False]
    """
    tags = list(THOUGHT_TAG.finditer(text))
    return bool(tags) and tags[-1]["end"] is None


def _after(before: str, text: str) -> str:
    """Return `text` without its leading gap if `before` already ends in one ("<think>\\n" + " I will ...")."""
    return text.lstrip() if before[-1:].isspace() else text
