"""How one chat template takes a conversation is found by trying, once, when a model is loaded.

Templates differ in what they call reasoning, in whether they know a system turn and tools, and in what they
write for the model to go on from. Nothing is read out of a template's text: a word of ours in the right place
of what it renders shows that it took it.
"""

import json
from dataclasses import dataclass
from typing import Any

from dump.answer_spans import END_THINK, THINK, Messages
from dump.template import Marked, Template, TemplateRefusedError

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_WORDS = ("Qzxaaxz", "Qzxbbxz", "Qzxccxz")
_QUESTION = {"role": "user", "content": "Which colour?"}


@dataclass(frozen=True)
class _CallForm:
    """Whether arguments are given as a string of JSON, and what the content beside calls is without text."""

    as_text: bool
    empty: str | None


class Dialect:
    """A template with the way it wants messages.

    `prompt`: what it writes for the model to go on from, "" if nothing. `has_system`, `has_tools`: it knows
    them. `reasoning`: the field it takes reasoning from; `inline` for tags in the content; `prompted` where
    it removes all reasoning but its prompt begins some; `removed` where it only removes.
    """

    def __init__(self, template: Template, variables: dict[str, Any]):
        self._template, self._variables = template, variables
        self._calls = _CallForm(as_text=False, empty="")
        self.reasoning = "inline"
        self.prompt = self._find_prompt()
        self.has_system = self._keeps({"role": "system", "content": _WORDS[0]}, _QUESTION, _answer(_WORDS[1]))
        self.reasoning = self._find_reasoning()
        self.has_tools = self._find_tools()

    def apply(self, messages: Messages, tools: list[dict[str, Any]], prompt: bool = False) -> Marked:
        """What the template renders of cleaned messages. TemplateRefusedError if it raises."""
        given = [self._given(message) for message in messages]
        return self._template.render(
            messages=given,
            tools=tools or None,
            documents=None,
            add_generation_prompt=prompt,
            **self._variables,
        )

    def fold_system(self, messages: Messages) -> Messages:
        """The system turn in front of the first question, as models without one are told it."""
        if self.has_system or messages[0]["role"] != "system" or messages[1]["role"] != "user":
            return messages
        system, question, *others = messages
        return [question | {"content": f"{system['content']}\n\n{question['content']}"}, *others]

    def _given(self, message: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if message.get("name"):
            given["name"] = message["name"]
        if message.get("call_id"):
            given["tool_call_id"] = message["call_id"]
        thought = message.get("reasoning")
        if thought and self.reasoning == "inline":
            given["content"] = f"{THINK}\n{thought}\n{END_THINK}\n\n{message['content']}"
        elif thought and self.reasoning in _REASONING_FIELDS:
            given[self.reasoning] = thought
        if message.get("calls"):
            given["content"] = given["content"] or self._calls.empty
            given["tool_calls"] = [self._call(call, i) for i, call in enumerate(message["calls"])]
        return given

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        arguments = call["arguments"]
        if self._calls.as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        return {"id": f"call{number:05d}", "type": "function", "function": function}

    def _text(self, *messages: dict[str, Any], prompt: bool = False, tools: Any = ()) -> str:
        try:
            return self.apply(list(messages), list(tools), prompt)[0]
        except TemplateRefusedError:
            return ""

    def _find_prompt(self) -> str:
        plain, prompted = self._text(_QUESTION), self._text(_QUESTION, prompt=True)
        return prompted[len(plain) :] if prompted.startswith(plain) else ""

    def _keeps(self, *messages: dict[str, Any]) -> bool:
        text = self._text(*messages)
        return _WORDS[0] in text and _WORDS[1] in text

    def _find_reasoning(self) -> str:
        answer = _answer(_WORDS[1]) | {"reasoning": _WORDS[0]}
        for form in (*_REASONING_FIELDS, "inline"):
            self.reasoning = form
            if self._keeps(_QUESTION, answer):
                return form
        return "prompted" if self.prompt.rstrip().endswith(THINK) else "removed"

    def _find_tools(self) -> bool:
        called, key, defined = _WORDS
        schema = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}}
        function = {"name": defined, "description": "d", "parameters": schema}
        call = _answer("") | {"calls": [{"name": called, "arguments": {key: "b"}}]}
        result = {"role": "tool", "content": "c", "name": called}
        talk = (_QUESTION, call, result, _answer("d"))
        for form in [_CallForm(as_text, empty) for as_text in (False, True) for empty in ("", None)]:
            self._calls = form
            text = self._text(*talk, tools=[{"type": "function", "function": function}])
            escaped = any(mark in text for mark in (f"'{key}'", f'\\"{key}', "None"))
            if all(word in text for word in _WORDS) and not escaped:
                return True
        return False


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
