"""Conversations to text through a tokenizer's chat template, with the assistant's part of it marked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ASSISTANT = "assistant"
# Around what a template marks as the assistant's, until it is told apart: characters that Unicode keeps for a program's
# own use, so that no text has them.
BEGINS, STOPS = "\ufdd0", "\ufdd1"
Message = dict[str, Any]


class ChatError(Exception):
    """A conversation that the template cannot render, or not so that its turns can be told apart."""


class Rendered(NamedTuple):
    """A conversation as text. spans: characters that are the assistant's, each from the first to past the last."""

    text: str
    spans: list[tuple[int, int]]


class Generation(Extension):
    """`{% generation %}`, which some templates put around the assistant's words: what is inside, between marks."""

    tags = {"generation"}  # noqa: RUF012  what jinja2 calls it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, stops = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (BEGINS, STOPS))
        return [begins, *inside, stops]


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
        """A whole conversation. The assistant's part is what the template marks or, where it marks nothing, what each
        of the assistant's turns adds to the text that asks for it.

        Raises ChatError where the template marks nothing and changes earlier text when a turn is added.
        """
        if any(mark in message["content"] for message in messages for mark in (BEGINS, STOPS)):
            raise ChatError("it holds U+FDD0 or U+FDD1, which stand for no character")
        whole = self.render(messages)
        if BEGINS in whole:
            return without_marks(whole)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            asked, said = self.render(messages[:number], asks=True), self.render(messages[: number + 1])
            if not said.startswith(asked) or not whole.startswith(said):
                raise ChatError(f"the chat template writes turns before turn {number + 1} otherwise than without it")
            spans.append((len(asked), len(said)))
        return Rendered(whole, spans)


def without_marks(text: str) -> Rendered:
    """A text without its marks, and what was between them."""
    first, *marked = text.split(BEGINS)
    parts, spans = [first], list[tuple[int, int]]()
    for part in marked:
        said, stop, rest = part.partition(STOPS)
        if not stop or STOPS in rest:
            raise ChatError("the chat template's {% generation %} is inside another one")
        begins = sum(map(len, parts))
        spans.append((begins, begins + len(said)))
        parts += [said, rest]
    return Rendered("".join(parts), spans)


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
