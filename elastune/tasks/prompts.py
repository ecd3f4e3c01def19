"""Prompt templates: ONE wording per task, used alike for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastune.errors import BadRecipe, nearest

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Template:
    """How a question becomes a prompt.

    Attributes:
        name: its name in ``TEMPLATES``.
        prompt: question -> prompt text.
        lead: what a completion starts with, so that prompt and completion are tokenised apart
            into the pieces the model would meet in running text.
        stop: text with which a rambling model opens the next question itself; ``""`` for none.
    """

    name: str
    prompt: Callable[[str], str]
    lead: str = ""
    stop: str = ""

    def completion(self, text: str) -> str:
        """Return ``text`` as it follows the prompt; ``""`` stays ``""``."""
        return self.lead + text if text else ""

    def has_stop(self, text: str) -> bool:
        """Tell whether generated ``text`` has gone on to a next question."""
        return bool(self.stop) and self.stop in text

    def cut(self, text: str) -> str:
        """Return generated ``text`` up to a next question."""
        return text.split(self.stop, 1)[0] if self.stop else text


def _alpaca(tokenizer: Any) -> Template:
    """Alpaca's prompt without input section, as LLM-Adapters, LoNAS and Shears use."""
    return Template("alpaca", lambda q: _ALPACA.format_map({"question": q}), stop="### Instruction")


def _qa(tokenizer: Any) -> Template:
    """A short prompt, for tasks whose cost is mostly prompt tokens."""
    return Template("qa", lambda q: f"Question: {q}\nAnswer:", lead=" ", stop="Question:")


def _none(tokenizer: Any) -> Template:
    return Template("none", lambda q: q)


def _chat(tokenizer: Any) -> Template:
    return Template(
        "chat",
        lambda q: chat_prompt(tokenizer, [{"role": "user", "content": q}], "template 'chat'"),
    )


TEMPLATES: dict[str, Callable[[Any], Template]] = {
    "alpaca": _alpaca,
    "qa": _qa,
    "chat": _chat,
    "none": _none,
}


def make_template(name: str, tokenizer: Any = None) -> Template:
    """Return the prompt template called ``name``.

    Raises:
        BadRecipe: unknown name, or ``chat`` without a tokenizer that has a chat template.
    """
    if name not in TEMPLATES:
        raise BadRecipe(
            f"template {name!r} is not known{nearest(name, TEMPLATES)}; "
            f"allowed: {', '.join(TEMPLATES)}."
        )
    if name == "chat":
        _require_chat(tokenizer, "template 'chat'")
    return TEMPLATES[name](tokenizer)


def refuse_template(template: str | None, task: str) -> None:
    """Raise BadRecipe when a template is given to a task whose inputs have a wording of their own.

    Those are the tasks without generated answers.
    """
    if template not in (None, "none"):
        raise BadRecipe(
            f"task {task!r} takes no template, but {template!r} was given: the wording of its "
            "inputs is fixed.",
            try_="leave template out",
        )


def chat_prompt(tokenizer: Any, messages: list[dict[str, str]], wanted_by: str) -> str:
    """Return ``messages`` in the tokenizer's chat format, ready for the assistant's turn.

    Thinking is switched off where the chat template knows the switch: completions hold none.

    Raises:
        BadRecipe: no tokenizer, or one without a chat template.
    """
    _require_chat(tokenizer, wanted_by)
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template is a program, in a sandbox; it fails as it likes
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadRecipe(
            f"{wanted_by}: the tokenizer's chat template cannot be filled in: {said}",
            try_="template: alpaca, or another chat_template in its tokenizer_config.json",
        ) from error
    bos = tokenizer.bos_token
    # The tokenizer adds its own BOS to a prompt: a second one in the text would double it.
    if bos and text.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text


def _require_chat(tokenizer: Any, wanted_by: str) -> None:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        given = "none was given" if tokenizer is None else "this one has no chat template"
        raise BadRecipe(
            f"{wanted_by} needs a tokenizer with a chat template; {given}.",
            try_="use an instruct model, or template: alpaca with prompt/completion data",
        )
