"""A list of message dicts, in any of the usual spellings, becomes canonical messages.

OpenAI's `role`/`content` and ShareGPT's `from`/`value` are read alike. Arrow and Parquet fill keys
that a message does not have with null, so a null key always counts as absent. What cannot be
trained on is an error with the place in the row; what is only odd is counted and kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from qwen3_sft.chat.samples import Message, Role, ToolCall
from qwen3_sft.chat.templates import TOOL_CALL
from qwen3_sft.data.rows.answers import parse_answer, parse_call_turn
from qwen3_sft.data.rows.calls import Tools, as_openai_tools, parse_tool_calls, parse_tools
from qwen3_sft.data.rows.content import Content, read_content, result_text
from qwen3_sft.data.rows.fields import account
from qwen3_sft.data.rows.loss_flags import MESSAGE_FLAGS, message_flag
from qwen3_sft.data.rows.reasoning import REASONING_FIELDS
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.turn_lists import ROLE_KEYS
from qwen3_sft.data.rows.values import describe, load_json, warn_control_text
from qwen3_sft.data.rows.written_calls import split_responses

# What a data set may call a role, in lower case, by what chat templates call it.
_NAMES: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "claude"),
    "tool": (
        "tool", "function", "observation", "ipython", "tool_response", "tool_result",
        "tool_results", "function_response", "tool_output",
    ),
}  # fmt: skip
_ROLES: dict[str, Role] = {name: role for role, names in _NAMES.items() for name in names}
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # an assistant's turn that is a call
# A turn of several: {"user": question, "assistant": answer}; xtuner's input and output.
_PAIRED: dict[str, Role] = {**_ROLES, "input": "user", "output": "assistant"}
_CONTENT_KEYS = ("content", "value", "text")
# What has to be looked at: control tokens, lone surrogates, NUL.
_SPECIAL = re.compile(
    r"<[|\uff5c]|</?(?:think|tool_|function|s>|eos>|end_of)|\[TOOL_CALLS\]|\0|[\ud800-\udfff]"
)
_HANDLED = frozenset(
    {*ROLE_KEYS, *_CONTENT_KEYS, "tool_calls", "function_call", "tools", "functions"}
    | MESSAGE_FLAGS
    | REASONING_FIELDS
)


@dataclass(slots=True)
class Turns:
    """The messages of one list, as they are read.

    Attributes:
        messages: in order; a result or a call may share its message in the row with others.
        origins: of each, the index in the row's list.
        flags: of each, whether it is learned; None where it does not say.
        tools: described in messages, with the place.
        count: messages in the row's list.
    """

    messages: list[Message] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    flags: list[bool | None] = field(default_factory=list)
    tools: list[tuple[str, Tools]] = field(default_factory=list)
    count: int = 0

    def add(self, message: Message, origin: int, flag: bool | None = None) -> None:
        """Append a message."""
        self.messages.append(message)
        self.origins.append(origin)
        self.flags.append(flag)

    def extend(self, later: Turns) -> None:
        """Append the turns of another list."""
        self.messages += later.messages
        self.origins += [origin + self.count for origin in later.origins]
        self.flags += later.flags
        self.tools += later.tools
        self.count += later.count


def parse_turns(value: Any, column: str, source: Source, tools: Tools = ()) -> Turns:
    """Parse a list of message dicts.

    Args:
        value: what the column holds; a string is JSON.
        column: its name, for error messages.
        source: the row's location and counters.
        tools: that the row describes.

    Raises:
        DataError: for a value that is no list of messages, an unknown role, missing content.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = load_json(value, f"column {column!r}", source)
    if not isinstance(value, list | tuple):
        source.fail(
            f"column {column!r} must be a list of messages, found {describe(value)}; "
            'write [{"role": "user", "content": "..."}, ...]'
        )
    turns = Turns(count=len(value))
    for index, turn in enumerate(value):
        _parse_turn(turns, turn, index, f"{column}[{index}]", source, tools)
    return turns


def check_order(messages: tuple[Message, ...], source: Source) -> None:
    """Raise for a conversation that cannot be trained on, count odd orders of turns."""
    if not messages:
        source.fail("empty conversation: it has no messages")
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        source.fail("no assistant turn, so there is nothing to learn; remove the row")
    answered = roles.index("assistant")
    if "tool" in roles[:answered]:
        source.fail(f"messages[{roles.index('tool')}] is a tool result before any assistant turn")
    if "system" in roles[1:]:
        source.warn("system message not first")
    if "user" not in roles[:answered]:
        source.warn("conversation starts with an assistant turn")
    for role in ("user", "assistant"):
        repeats = sum(a == b == role for a, b in pairwise(roles))
        source.warnings.update({f"two {role} turns in a row": repeats} if repeats else {})


def _parse_turn(
    turns: Turns, turn: Any, index: int, where: str, source: Source, tools: Tools
) -> None:
    if (plain := _plain_message(turn)) and not source.reading.ignored:
        turns.add(plain, index)
        return
    if not isinstance(turn, dict):
        source.fail(f"{where} must be a message, found {describe(turn)}")
    fields = source.kept(turn, "message.")
    if not any(key in fields for key in ROLE_KEYS) and _is_pair(fields):
        for name, text in fields.items():
            paired = {"role": _PAIRED[name.lower()], "content": text}
            _parse_turn(turns, paired, index, f"{where} {name}", source, tools)
        return
    name, content = _role_and_content(fields, where, source)
    account(fields, _HANDLED, where, "message.", source)
    flag = message_flag(fields, where, source)
    for key in ("tools", "functions"):
        if fields.get(key):
            tools_here = parse_tools(fields[key], f"{where}.{key}", source)
            tools_here = as_openai_tools(tools_here) if key == "functions" else tools_here
            turns.tools.append((f"{where} {key}", tools_here))
    role = "assistant" if name in _CALL_ROLES else _ROLES.get(name)
    if role is None:
        source.fail(
            f"{where} has role {fields.get('role', fields.get('from'))!r}; accepted are system, "
            "user, assistant, tool (ShareGPT: human, gpt, observation, function_call)"
        )
    if flag and role != "assistant":
        source.fail(
            f"{where} is a {role} message that asks for labels, and only answers are learned; "
            "remove the flag, or set --train_on all to learn every token"
        )
    if name in _CALL_ROLES:
        _add_call_turn(turns, fields, content, index, flag, where, source, tools)
    elif role == "assistant":
        _add_answer(turns, fields, content, index, flag, where, source, tools)
    else:
        _refuse_answers_fields(fields, role, where, source)
        _add_context(turns, role, content, index, where, source)


def _plain_message(turn: Any) -> Message | None:
    """Return a message of a role and a text in which nothing is to be found, as most are."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    if "role" in turn:
        name, text = turn["role"], turn.get("content")
    else:
        name, text = turn.get("from"), turn.get("value")
    if type(text) is not str or type(name) is not str:
        return None
    role = _ROLES.get(name)
    if role is None or role == "tool" or not text or text.isspace():
        return None
    is_simple = text.isascii() and not any(sign in text for sign in ("<", "\0", "[TOOL_CALLS]"))
    return Message(role, text) if is_simple or not _SPECIAL.search(text) else None


def _is_pair(fields: dict[str, Any]) -> bool:
    names = [name.lower() for name in fields if isinstance(name, str)]
    return len(names) > 1 and all(name in _PAIRED for name in names)


def _role_and_content(fields: dict[str, Any], where: str, source: Source) -> tuple[Any, Any]:
    roles = [key for key in ROLE_KEYS if key in fields]
    contents = [key for key in _CONTENT_KEYS if key in fields]
    if len(roles) != 1 or len(contents) > 1:
        source.fail(
            f"{where} needs either role and content or from and value, found keys {sorted(fields)}"
        )
    name = fields[roles[0]]
    return (
        name.strip().lower() if isinstance(name, str) else None,
        fields[contents[0]] if contents else None,
    )


def _refuse_answers_fields(fields: dict[str, Any], role: str, where: str, source: Source) -> None:
    if fields.get("tool_calls") or fields.get("function_call"):
        source.fail(f"{where} is a {role} message with tool_calls; only an assistant calls tools")
    if given := [key for key in REASONING_FIELDS if fields.get(key)]:
        source.fail(f"{where} is a {role} message with {given[0]}; only an assistant reasons")


def _add_answer(
    turns: Turns, fields: dict[str, Any], content: Any, index: int, flag: bool | None, where: str,
    source: Source, tools: Tools,
) -> None:  # fmt: skip
    read = Content() if content is None else read_content(content, f"{where} content", source)
    for what in ("results", "tools"):
        if getattr(read, what):
            source.fail(f"{where} is an assistant message with a part for {what}")
    calls = _calls(fields, where, source)
    if calls and read.calls:
        source.fail(f"{where} has calls in its parts and in tool_calls; keep one")
    message = parse_answer(read, fields, where, source, calls=calls or read.calls, tools=tools)
    turns.add(message, index, flag)


def _calls(fields: dict[str, Any], where: str, source: Source) -> tuple[ToolCall, ...]:
    calls = parse_tool_calls(fields.get("tool_calls"), where, source)
    legacy = parse_tool_calls(fields.get("function_call"), where, source)
    if calls and legacy and calls != legacy:
        source.fail(f"{where} has tool_calls and function_call, which differ; keep one")
    return calls or legacy


def _add_call_turn(
    turns: Turns, fields: dict[str, Any], content: Any, index: int, flag: bool | None, where: str,
    source: Source, tools: Tools,
) -> None:  # fmt: skip
    """Add a turn that is a call; it ends the answer that stands before it, if there is one."""
    content = fields.get("tool_calls", fields.get("function_call")) if content is None else content
    message = parse_call_turn(content, fields, where, source, tools=tools)
    before = turns.messages[-1] if turns.messages else None
    if before is None or before.role != "assistant" or message.reasoning or message.content:
        turns.add(message, index, flag)
        return
    if flag is not None and flag != turns.flags[-1]:
        source.fail(
            f"{where} ends the answer before it, whose loss flag differs; give both one flag"
        )
    turns.messages[-1] = replace(before, tool_calls=before.tool_calls + message.tool_calls)


def _add_context(
    turns: Turns, role: Role, content: Any, index: int, where: str, source: Source
) -> None:
    """Add what the model reads: a question, a system prompt, results of tools."""
    if role == "tool":
        text = result_text(content, f"{where} content", source)
        for result in split_responses(text, f"{where} content", source):
            warn_control_text(result, source)
            turns.add(Message("tool", result), index)
        return
    read = read_content(content, f"{where} content", source)
    if read.calls or read.reasoning:
        source.fail(
            f"{where} is a {role} message with a call or reasoning, which only answers have"
        )
    for result in read.results:
        turns.add(Message("tool", result), index)
    if read.tools:
        turns.tools.append((f"{where} content", read.tools))
    if (read.results or read.tools) and not read.text:
        return
    if role == "system" and TOOL_CALL in read.text:
        source.warn("tools described in the text of a system message")
    else:
        warn_control_text(read.text, source)
    if role == "user" and not read.text.strip():
        source.warn("empty user turn")
    turns.add(Message(role, read.text), index)
