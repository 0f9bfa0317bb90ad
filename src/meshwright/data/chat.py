"""Conversations to text through a tokenizer's chat template, with the assistant's part of it marked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ASSISTANT = "assistant"
Message = dict[str, Any]


class ChatError(Exception):
    """A conversation that the template cannot render, or not so that its turns can be told apart."""


class Rendered(NamedTuple):
    """A conversation as text. spans: characters that are the assistant's, each from the first to past the last."""

    text: str
    spans: list[tuple[int, int]]


class Generation(Extension):
    """`{% generation %}`, which some templates put around the assistant's words: what is inside, as it is."""

    tags = {"generation"}  # noqa: RUF012  what jinja2 calls it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template in the environment that such templates are written for.

    It runs in a sandbox, because it comes with a download. It is not told the date: the same conversation gives the
    same text on every day, and templates that ask for `strftime_now` have a fixed date for where it is missing.
    """

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        self._names = dict(names)
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ChatError(f"the chat template is damaged ({error})") from None

    def render(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """The text of some turns; `asks`: up to where the assistant begins to speak."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=asks, **self._names)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ChatError(f"the chat template cannot render it ({error})") from None

    def render_marked(self, messages: Sequence[Message]) -> Rendered:
        """A whole conversation. The assistant's part is what each of its turns adds to the text that asks for it.

        Raises ChatError where the template changes earlier text when a turn is added.
        """
        whole = self.render(messages)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            asked, said = self.render(messages[:number], asks=True), self.render(messages[: number + 1])
            if not said.startswith(asked) or not whole.startswith(said):
                raise ChatError(f"the chat template writes turns before turn {number + 1} otherwise than without it")
            spans.append((len(asked), len(said)))
        return Rendered(whole, spans)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja2's own filter of this name would write it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(reason: str) -> NoReturn:
    """What templates call where a conversation does not fit them."""
    raise TemplateError(reason)
