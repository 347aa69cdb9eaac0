"""The text of a conversation, equal to what the family's released chat template renders.

Each writer below is one branch of that template. tojson is HF's: `json.dumps` without escaping
non-ASCII, keys in the order of the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

from qwen3_sft.chat.pieces import PieceWriter, Rendered, Segment
from qwen3_sft.chat.samples import Message, ToolCall
from qwen3_sft.chat.templates import (
    END_THINK,
    END_TOOL_CALL,
    END_TOOL_RESPONSE,
    IM_END,
    IM_START,
    THINK,
    TOOL_CALL,
    TOOL_RESPONSE,
    XML_DEFAULT_SYSTEM,
    ChatFormat,
)


def is_query(message: Message) -> bool:
    """Whether the template takes a turn for a question of the user, not for a tool's result."""
    return message.role == "user" and not (
        message.content.startswith(TOOL_RESPONSE) and message.content.endswith(END_TOOL_RESPONSE)
    )


def last_query_index(messages: Sequence[Message]) -> int:
    """Index of the last query; of the last message where there is none, as the templates do."""
    last = len(messages) - 1
    return next((index for index in range(last, -1, -1) if is_query(messages[index])), last)


def write_conversation(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    fmt: ChatFormat,
    *,
    labelled: Collection[int] = (),
    keep_reasoning: bool = False,
    label_empty_think: bool = False,
    written: dict[Hashable, Segment] | None = None,
) -> Rendered:
    """Write a conversation as the family's template does, and labelled turns as they are generated.

    Args:
        messages: the turns.
        tools: function descriptions.
        fmt: the family.
        labelled: indices of the assistant turns that carry labels. Without any, the text is the
            template's; those have a think block, empty ones too, as inference opens or makes it.
        keep_reasoning: write the reasoning of earlier turns too, which the templates strip.
        label_empty_think: label an empty think block too, which otherwise counts as prompt as far
            as a prompt can give it.
        written: keeps turns for other calls that write the beginning of the same conversation, with
            the same tools, family and `label_empty_think`.
    """
    written = {} if written is None else written
    last_query = last_query_index(messages)
    segments = []
    for index, message in enumerate(messages):
        form: tuple[bool, ...] = ()
        if message.role == "assistant":
            trained = index in labelled
            # The last turn of a text, or of the history that a labelled answer was given, has one.
            is_last = index == len(messages) - 1 or index + 1 in labelled
            kept = message.reasoning and keep_reasoning
            in_round = index > last_query and (is_last or message.reasoning)
            form = trained, fmt.thinks and bool(trained or kept or in_round)
        elif message.role == "tool":
            form = _place_among_results(messages, index)
        key = index, form
        if key not in written:
            writer = PieceWriter()
            if index == 0:
                _write_system(writer, messages, tools, fmt)
            _write_turn(writer, index, message, form, fmt, label_empty_think=label_empty_think)
            written[key] = writer.finish()
        segments.append(written[key])
    return Rendered(tuple(segments))


def _place_among_results(messages: Sequence[Message], index: int) -> tuple[bool, bool]:
    """Return whether a result is the first and the last of its user turn."""
    is_first = index == 0 or messages[index - 1].role != "tool"
    is_last = index == len(messages) - 1 or messages[index + 1].role != "tool"
    return is_first, is_last


def _write_turn(
    writer: PieceWriter, index: int, message: Message, form: tuple[bool, ...], fmt: ChatFormat, *,
    label_empty_think: bool,
) -> None:  # fmt: skip
    """Write a turn; `form` is (trained, thinks) of an answer, (first, last) of a tool's result."""
    if message.role == "tool":
        is_first, is_last = form
        _write_tool_result(writer, message, fmt, is_first=is_first, is_last=is_last)
    elif message.role == "assistant" and fmt.xml_tools:
        _write_xml_answer(writer, message, trained=form[0])
    elif message.role == "assistant":
        trained, thinks = form
        _open_turn(writer, "assistant")
        if thinks:
            is_produced = message.reasoning is not None or label_empty_think
            reasoning = message.reasoning or ""
            _write_think(writer, reasoning, fmt, trained=trained, is_produced=is_produced)
        _write_json_answer(writer, message, after_think=thinks, trained=trained)
    elif index > 0 or message.role == "user":
        _open_turn(writer, message.role)
        writer.plain(message.content)
        _close_turn(writer)


def write_prompt(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    fmt: ChatFormat,
    *,
    enable_thinking: bool | None,
) -> str:
    """Return the prompt of inference for the next answer, as the family's template writes it."""
    opening = f"{IM_START}assistant\n"
    if fmt.prompt_opens_think:
        opening += f"{THINK}\n"
    elif fmt.thinks and enable_thinking is False:
        opening += f"{THINK}\n\n{END_THINK}\n\n"
    return write_conversation(messages, tools, fmt).text + opening


def to_json(value: Any) -> str:
    """Write JSON as the tojson filter of transformers' chat templates does."""
    return json.dumps(value, ensure_ascii=False)


def _open_turn(writer: PieceWriter, role: str) -> None:
    writer.control(IM_START)
    writer.plain(f"{role}\n")


def _close_turn(writer: PieceWriter, *, trained: bool = False) -> None:
    # Generation stops at <|im_end|>, so the newline after it is never the model's.
    writer.control(IM_END, trained=trained)
    writer.plain("\n")


def _write_system(
    writer: PieceWriter,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    fmt: ChatFormat,
) -> None:
    system = messages[0].content if messages[0].role == "system" else None
    if system is None and not tools:
        return
    _open_turn(writer, "system")
    if fmt.xml_tools:
        writer.plain(XML_DEFAULT_SYSTEM if system is None else system)
    elif system is not None:
        writer.plain(system + "\n\n" if tools else system)
    if tools:
        writer.template(fmt.tools_head)
        for tool in tools:
            writer.plain(_xml_tool(tool) if fmt.xml_tools else "\n" + to_json(tool))
        writer.template(fmt.tools_tail)
    _close_turn(writer)


def _write_tool_result(
    writer: PieceWriter, message: Message, fmt: ChatFormat, *, is_first: bool, is_last: bool
) -> None:
    """Write one result; neighbouring results share one user turn."""
    before, after = ("", "\n") if fmt.xml_tools else ("\n", "")
    if is_first:
        writer.control(IM_START)
        writer.plain("user" + after)
    writer.plain(before)
    writer.control(TOOL_RESPONSE)
    writer.plain("\n" + message.content + "\n")
    writer.control(END_TOOL_RESPONSE)
    writer.plain(after)
    if is_last:
        _close_turn(writer)


def _write_think(
    writer: PieceWriter, reasoning: str, fmt: ChatFormat, *, trained: bool, is_produced: bool
) -> None:
    """Write a block; a prompt gives its opening, all of it if it is empty, or nothing."""
    opened = trained and is_produced and not fmt.prompt_opens_think
    trained = trained and (is_produced or fmt.prompt_opens_think)
    writer.control(THINK, trained=opened)
    writer.plain("\n", trained=opened)
    writer.plain(reasoning.strip("\n") + "\n", trained=trained)
    writer.control(END_THINK, trained=trained)
    writer.plain("\n\n", trained=trained)


def _write_json_answer(
    writer: PieceWriter, message: Message, *, after_think: bool, trained: bool
) -> None:
    said = message.content.lstrip("\n") if after_think else message.content
    writer.plain(said, trained=trained)
    for index, call in enumerate(message.tool_calls):
        writer.plain("\n" if index or message.content else "", trained=trained)
        writer.control(TOOL_CALL, trained=trained)
        body = f'{{"name": "{call.name}", "arguments": {to_json(call.arguments)}}}'
        writer.plain(f"\n{body}\n", trained=trained)
        writer.control(END_TOOL_CALL, trained=trained)
    _close_turn(writer, trained=trained)


def _write_xml_answer(writer: PieceWriter, message: Message, *, trained: bool) -> None:
    _open_turn(writer, "assistant")
    if not message.tool_calls:
        writer.plain(message.content, trained=trained)
    said = message.content.strip()
    for index, call in enumerate(message.tool_calls):
        # The newline before a lone first call is the one that ends the generation prompt.
        between = "\n" if index else f"{said}\n\n" if said else ""
        writer.plain(between, trained=trained)
        writer.control(TOOL_CALL, trained=trained)
        writer.plain(_xml_call(call), trained=trained)
        writer.control(END_TOOL_CALL, trained=trained)
    _close_turn(writer, trained=trained)


def _xml_call(call: ToolCall) -> str:
    parameters = "".join(
        f"<parameter={name}>\n{_xml_value(value)}\n</parameter>\n"
        for name, value in call.arguments.items()
    )
    return f"\n<function={call.name}>\n{parameters}</function>\n"


def _xml_value(value: Any) -> str:
    return to_json(value) if isinstance(value, dict | list | tuple) else str(value)


def _xml_tool(tool: dict[str, Any]) -> str:
    tool = tool.get("function", tool)
    parameters = tool.get("parameters")
    fields = parameters.get("properties") if isinstance(parameters, dict) else None
    described = fields.items() if isinstance(fields, dict) else ()
    lines = [
        f"\n<function>\n<name>{tool['name']}</name>",
        _xml_description(tool),
        "\n<parameters>",
        *(_xml_parameter(name, field) for name, field in described),
        _xml_extra(parameters, ("type", "properties")),
        "\n</parameters>",
        _xml_extra(tool, ("type", "name", "description", "parameters")),
        "\n</function>",
    ]
    return "".join(lines)


def _xml_parameter(name: str, field: Any) -> str:
    kind = f"\n<type>{field['type']}</type>" if isinstance(field, dict) and "type" in field else ""
    described = _xml_description(field) + _xml_extra(field, ("name", "type", "description"))
    return f"\n<parameter>\n<name>{name}</name>{kind}{described}\n</parameter>"


def _xml_description(field: Any) -> str:
    if not isinstance(field, dict) or "description" not in field:
        return ""
    return f"\n<description>{str(field['description']).strip()}</description>"


def _xml_extra(field: Any, handled: Iterable[str]) -> str:
    if not isinstance(field, dict):
        return ""
    return "".join(
        f"\n<{key}>{_xml_value(value)}</{key}>"
        for key, value in field.items()
        if key not in handled
    )
