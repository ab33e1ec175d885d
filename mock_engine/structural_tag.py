"""
Answers in the shape of a structural tag, which is how Dynamo hands tools over to an engine.

    StructuralTag(writer, tool_call_ratio).write(tag, page, draw)

A structural tag (XGrammar's, as Dynamo 1.3 to 1.6 sends it) describes the whole answer: where
free text may stand, where a tool call may begin, with the marks of the model's own format
and the JSON schema of its arguments. Dynamo makes it out of `tools`, `tool_choice` and
`parallel_tool_calls`; a tag that leaves it open whether a tool is called is decided here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mock_engine.errors import RequestError
from mock_engine.grammar_writer import GrammarWriter, json_grammar, regex_grammar, text_grammar

_SECOND_CALL_RATIO = 0.25  # share of answers with another call, where several are allowed
_MEAN_TEXT_TOKENS = 12  # of text that must stand in a tag
_SEED_LIMIT = 1 << 63


class Page:
    """An answer that is being written: text, and how much of it may still come."""

    def __init__(self, writer: GrammarWriter, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.is_whole = True  # False once `max_tokens` has cut it; nothing more is added then
        self._writer = writer
        self._text = ""
        self._cut: list[int] = []

    def add_text(self, text: str) -> None:
        """These words as they are."""
        if self.is_whole:
            self._text += text

    def add_grammar(self, grammar: str, seed: int, render: Callable[[str], str] = str) -> None:
        """What `render` makes of a text that the grammar allows. Raises `RequestError` if it cannot be used."""
        if not self.is_whole:
            return
        written = self._writer.write(grammar, seed, self.max_tokens)
        if written.is_whole:
            self._text += render(self._writer.decode(written.token_ids))
        else:
            self._cut, self.is_whole = written.token_ids, False

    def token_ids(self) -> list[int]:
        """What has been written, in tokens; possibly more than `max_tokens`."""
        return self._writer.encode(self._text) + self._cut


class StructuralTag:
    """Writes tags; `write_words` gives a number of words for a seed, with a space before each."""

    def __init__(self, write_words: Callable[[int, int], str], tool_call_ratio: float) -> None:
        self._write_words = write_words
        self._tool_call_ratio = tool_call_ratio

    def write(self, tag: Any, page: Page, draw: np.random.Generator) -> bool:
        """Write an answer that keeps to `tag`. False, and nothing written, if that is any text without a call."""
        try:
            return self._write_answer(json.loads(tag) if isinstance(tag, str) else tag, page, draw)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"the structural tag cannot be read: {type(error).__name__} at {error}") from error

    def _write_answer(self, tag: Any, page: Page, draw: np.random.Generator) -> bool:
        form = _object(tag)
        if "structures" in form:  # as vLLM had it first
            form = _of_old_form(form)
        form = _object(form.get("format", form))
        if form.get("type") == "triggered_tags" and not form.get("at_least_one"):
            if draw.random() >= self._tool_call_ratio:
                return False
            form = {**form, "at_least_one": True}
        elif _is_free_text(form):
            return False
        self._write(form, page, draw)
        return True

    def _write(self, form: Any, page: Page, draw: np.random.Generator) -> None:
        form = _object(form)
        match form.get("type"):
            case "const_string":
                page.add_text(str(form["value"]))
            case "json_schema" | "qwen_xml_parameter":
                self._write_json(form, page, draw)
            case "regex":
                page.add_grammar(regex_grammar(str(form["pattern"])), _seed(draw))
            case "grammar":
                page.add_grammar(text_grammar(str(form["grammar"])), _seed(draw))
            case "any_text" | "any_tokens":
                page.add_text(self._write_words(_seed(draw), 1 + int(draw.exponential(_MEAN_TEXT_TOKENS))))
            case "tag":
                page.add_text(_text_of(form.get("begin")))
                if not _is_free_text(form) or form.get("end"):
                    self._write(form["content"], page, draw)
                page.add_text(_text_of(form.get("end")))
            case "sequence":
                for element in form["elements"]:
                    self._write(element, page, draw)
            case "or":
                self._write(_one_of(form["elements"], draw), page, draw)
            case "optional":
                if draw.random() < 0.5:
                    self._write(form["content"], page, draw)
            case "triggered_tags" | "tags_with_separator":
                self._write_tags(form, page, draw)
            case other:
                raise RequestError(
                    f"a structural tag of type {other!r} is not supported; allowed are const_string, json_schema, "
                    f"regex, grammar, any_text, tag, sequence, or, optional, triggered_tags and tags_with_separator"
                )

    def _write_tags(self, form: Mapping[str, Any], page: Page, draw: np.random.Generator) -> None:
        """One call or more. Where none is asked for, the share of calls decides."""
        tags = form["tags"]
        if not form.get("at_least_one") and draw.random() >= self._tool_call_ratio:
            return
        self._write(_one_of(tags, draw), page, draw)
        while not form.get("stop_after_first") and draw.random() < _SECOND_CALL_RATIO:
            page.add_text(str(form.get("separator", "\n")))
            self._write(_one_of(tags, draw), page, draw)

    def _write_json(self, form: Mapping[str, Any], page: Page, draw: np.random.Generator) -> None:
        schema, style = form.get("json_schema", True), form.get("style", "json")
        if form.get("type") == "qwen_xml_parameter":
            style = "qwen_xml"
        if schema is True or schema == {}:
            schema = {"type": "object"}
        if style not in _STYLES:
            allowed = ", ".join(_STYLES)
            raise RequestError(f"arguments in the style {style!r} are not supported; allowed is {allowed}")
        page.add_grammar(json_grammar(schema), _seed(draw), _STYLES[style])


def _as_qwen_xml(text: str) -> str:
    arguments = json.loads(text)
    return "\n".join(f"<parameter={name}>\n{_plain(value)}\n</parameter>" for name, value in arguments.items())


def _as_deepseek_xml(text: str) -> str:
    arguments = json.loads(text)
    return "".join(
        f'<｜DSML｜parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{_plain(value)}</｜DSML｜parameter>\n"
        for name, value in arguments.items()
    )


_STYLES: dict[str, Callable[[str], str]] = {
    "json": str,
    "qwen_xml": _as_qwen_xml,
    "deepseek_xml": _as_deepseek_xml,
}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _of_old_form(form: Mapping[str, Any]) -> dict[str, Any]:
    """`{"structures": [{"begin", "schema", "end"}], "triggers"}` as a tag of today."""
    tags = [
        {
            "type": "tag",
            "begin": structure.get("begin", ""),
            "content": {"type": "json_schema", "json_schema": structure.get("schema", True)},
            "end": structure.get("end", ""),
        }
        for structure in form["structures"]
    ]
    return {"type": "triggered_tags", "tags": tags}


def _is_free_text(form: Mapping[str, Any]) -> bool:
    """Whether any words do: nothing is asked for, or only that some marks stay away."""
    if form.get("type") == "tag" and not form.get("begin"):
        form = _object(form.get("content"))
    return form.get("type") in ("any_text", "any_tokens")


def _text_of(mark: Any) -> str:
    """A tag's begin or end; of several ends the first."""
    if isinstance(mark, Mapping):
        mark = mark.get("token", "")
    if isinstance(mark, Sequence) and not isinstance(mark, str):
        mark = mark[0] if mark else ""
    return str(mark or "")


def _one_of(forms: Sequence[Any], draw: np.random.Generator) -> Any:
    if not forms:
        raise RequestError("a structural tag offers nothing to choose from")
    return forms[int(draw.random() * len(forms))]


def _object(form: Any) -> Mapping[str, Any]:
    if not isinstance(form, Mapping):
        raise RequestError(f"a structural tag must be an object, not {form!r:.80}")
    return form


def _seed(draw: np.random.Generator) -> int:
    return int(draw.integers(_SEED_LIMIT))
