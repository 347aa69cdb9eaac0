"""What tells the released chat templates apart: their fixed texts, and how to recognise them.

Four families train here. `qwen3` (hybrid thinking) and `qwen3_thinking_2507` share every text but
the generation prompt; `qwen3_instruct_2507` never thinks; `qwen3_coder` writes tools as XML, in two
wordings of the instructions that the hub has carried.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"
CONTROL_TOKENS = (
    *(IM_START, IM_END, THINK, END_THINK),
    *(TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE),
)

_JSON_MARK = "You may call one or more functions to assist with the user query."
_JSON_HEAD = (
    f"# Tools\n\n{_JSON_MARK}\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_JSON_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)
_XML_HEAD = "\n\n# Tools\n\nYou have access to the following {noun}s:\n\n<tools>"
_XML_TAIL = (
    "\n</tools>\n\nIf you choose to call a {noun} ONLY reply in the following format with NO "
    "suffix:\n\n<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\n"
    "value_1\n</parameter>\n<parameter=example_parameter_2>\n{value}\n</parameter>\n</function>\n"
    "</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: "
    "{rule}\n- Required parameters MUST be specified\n- You may provide optional reasoning for "
    "your function call in natural language BEFORE the function call, but NOT after\n- If there "
    "is no function call available, answer the question like normal with your current knowledge "
    "and do not tell the user about function calls\n</IMPORTANT>"
)
XML_DEFAULT_SYSTEM = (
    "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How one family writes a conversation.

    Attributes:
        thinks: it has think blocks, and strips them from history.
        prompt_opens_think: its generation prompt ends with ``<think>`` and a newline, so the model
            never writes them itself.
        xml_tools: tools and calls are XML elements, not JSON objects.
        tools_head: system text before the tools.
        tools_tail: system text after the tools.
    """

    thinks: bool
    prompt_opens_think: bool
    xml_tools: bool
    tools_head: str
    tools_tail: str


CHAT_FORMATS = {
    "qwen3": ChatFormat(True, False, False, _JSON_HEAD, _JSON_TAIL),
    "qwen3_instruct_2507": ChatFormat(False, False, False, _JSON_HEAD, _JSON_TAIL),
    "qwen3_thinking_2507": ChatFormat(True, True, False, _JSON_HEAD, _JSON_TAIL),
    "qwen3_coder": ChatFormat(
        False,
        False,
        True,
        _XML_HEAD.format(noun="function"),
        _XML_TAIL.format(
            noun="function",
            value="This is the value for the second parameter\nthat can span\nmultiple lines",
            rule="an inner <function=...></function> block must be nested within "
            "<tool_call></tool_call> XML tags",
        ),
    ),
    "qwen3_coder_tools": ChatFormat(
        False,
        False,
        True,
        _XML_HEAD.format(noun="tool"),
        _XML_TAIL.format(
            noun="tool",
            value="value_2",
            rule="the tool calling block MUST begin with an opening <tool_call> tag and end with "
            "a closing </tool_call> tag.",
        ),
    ),
}


def detect_chat_format(chat_template: str | None) -> str:
    """Read off a tokenizer's chat template which of `CHAT_FORMATS` renders the same text.

    It goes by features of the Jinja source, so that comments and spacing do not matter;
    `qwen3_sft.chat.self_check` then compares rendered text.

    Raises:
        ValueError: for a template of none of these families.
    """
    source = chat_template or ""
    foreign = ("<|vision_start|>", "generation %}", "created by Alibaba Cloud", "render_item_list")
    if IM_START in source and not any(mark in source for mark in foreign):
        if "render_extra_keys" in source and THINK not in source:
            return "qwen3_coder_tools" if "following tools:" in source else "qwen3_coder"
        if "<function=" not in source and _JSON_MARK in source:
            return _detect_json_family(source)
    what = "has no chat template" if not source else "has a chat template of none of the families"
    raise ValueError(
        f"the tokenizer {what} {', '.join(CHAT_FORMATS)}; set --chat_format to the family the "
        "model was trained with, or take the tokenizer files of the released model"
    )


def _detect_json_family(source: str) -> str:
    if "last_query_index" not in source:
        return "qwen3_instruct_2507"
    if "enable_thinking" in source:
        return "qwen3"
    prompt = source.rpartition("add_generation_prompt")[2]
    return "qwen3_thinking_2507" if re.search(r"assistant\\n<think>\\n", prompt) else "qwen3"
