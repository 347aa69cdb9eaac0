"""Every field that data sets carry, by what it means to training: the table behind a refusal.

A field is data of its format, honoured, metadata, or refused by the name of what it is. Nothing
else passes, unless `--ignore_columns` names it. The names are those of the formats that axolotl,
LLaMA-Factory, ms-swift, NeMo, OpenRLHF, torchtune, TRL, verl and the fine-tuning services read, and
of the columns of public data sets on the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from qwen3_sft.data.rows.loss_flags import is_masking
from qwen3_sft.data.rows.source import Source

# Facts about a row, a message, a part or a call that no chat template shows to a model.
_METADATA = re.compile(
    r"|unnamed: \d+|__index_level_\d+__"
    r"|(?:.*_)?(?:ids?|uid|uuid|guid|idx|index|hash|sha\d*|md5|urls?|uri|link|timestamps?|date|time"
    r"|datetime|created|created_at|updated_at|sources?|license|scores?|ratings?|tokens|n_tokens"
    r"|num_tokens|token_count|length|num_turns|language|lang|difficulty|categor(?:y|ies)|tags?)"
    r"|metadata|meta|info|extra_info|extra|stats|annotations?|annotators?|version|revision|split"
    r"|subset|config|dataset|dataset_name|datasource|origin|provider|author|user_name|keywords?"
    r"|topics?|domains?|field|subcategory|task|task_type|type|problem_type|question_type|ability"
    r"|level|grade|subjects?|format|locale|country|state|quality|toxicity|toxic|redacted|moderation"
    r"|openai_moderation|detoxify_moderation|.*identifier|perplexity|ppl|model|model_name|generator|created_by"
    r"|usage|finish_reason|stop_reason|logprobs|refusal_score|num_samples|n_turns|turn|turns|rank"
    r"|hashed_ip|header|cache_control|signature|citations|object|service_tier|system_fingerprint"
    # What a request asked the server for; it is not part of the text.
    r"|temperature|top_p|top_k|min_p|max_tokens|max_completion_tokens|n|seed|stop|stream|store"
    r"|presence_penalty|frequency_penalty|parallel_tool_calls|tool_choice|response_format"
    r"|method|name|tool_name|user|is_error|status|end_turn"
)
_NOT_AT_ROWS = frozenset({"name", "tool_name", "user", "status", "turns", "field"})

_PREFERENCE = (
    "a preference between answers (DPO, ORPO, reward models), and this trains on answers alone; "
    "where the better one stands in the messages already, name the rest in --ignore_columns, else "
    "write it there, or map it: --columns completion=chosen --ignore_columns rejected"
)
_VISION = "media, and a text model sees none; take a text data set or remove these rows"
_RL = (
    "a prompt with what a reward is computed from (RL), and this trains on answers; write the "
    "answer to learn as an assistant's turn, and name the rest in --ignore_columns"
)
_KTO = (
    "a judgement whether the answer is good (KTO) or a class, and every answer here is learned; "
    "keep the good rows and remove the column, or name it in --ignore_columns"
)
_SEVERAL = (
    "several answers to one prompt, and one is learned; write it as the answer, and name the rest "
    "in --ignore_columns"
)
_STYLE = "an instruction to a chat template that Qwen's does not have; name it in --ignore_columns"

_REFUSED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(names), what)
    for names, what in (
        (r"(?:chosen|rejected|preferred|non_preferred|dispreferred|negatives?|losing|winning)(?:_.*)?"
         r"|.*_(?:chosen|rejected|preferred|dispreferred|[jkwl])|margin|winner|preferences?|better|worse"
         r"|(?:response|answer|output|completion|conversation|reply|model|chat|summary|candidate"
         r"|human_ref)s?_?[ab0-9]|(?:better|safer|best|worse|worst)_.*", _PREFERENCE),
        (r"(?:images?|videos?|audios?|pixel_values|objects|bbox|bboxes|image_grid_thw)(?:_.*)?"
         r"|input_audio|attachments?|media", _VISION),
        (r"reward_model|ground_truths?|rewards?|reward_.*|verifiers?|test_cases|rubrics?", _RL),
        (r"labels?|kto_tag|desirable|is_good|feedback", _KTO),
        (r"completions|responses|generations|candidates|answers|choices|outputs", _SEVERAL),
        (r"documents|channel|recipient|prefix|partial|chat_template|continue_final_message"
         r"|eot|response_schema", _STYLE),
        (r"training_detail|train_detail|loss_spans?|spans", "a mask of parts of an answer, and an "
         "answer is learned as a whole; split the turn, or name it in --ignore_columns"),
        (r"seq_lengths?|seqlens|cu_seqlens", "several documents in one row; give each its own row"),
    )
)  # fmt: skip


# What a model was stopped in is no answer that ends there.
_CUT = (
    "an answer that was cut off or withheld, and its end would be learned; remove the row, or name "
    "the field in --ignore_columns"
)
_STOPS = frozenset(
    {"length", "max_tokens", "max_output_tokens", "content_filter", "error", "incomplete",
     "in_progress", "failed", "cancelled", "false"}
)  # fmt: skip
_KINDS = frozenset(
    {"thinking", "reasoning", "thought", "think", "code", "console", "refusal", "error", "image",
     "image_url", "audio", "video", "file", "tool_use", "tool_call", "tool_calls", "function_call"}
)  # fmt: skip
# Metadata whose values may say more: where it stands (a prefix, None: anywhere), the values.
_TELLING: tuple[tuple[re.Pattern[str], str | None, frozenset[str], str], ...] = (
    (re.compile(r"(?:finish|stop)_reason|end_turn|status"), None, _STOPS, _CUT),
    (re.compile("type"), "message.", _KINDS, "a message that is no plain text; write it as what it "
     "is, a part of that type, reasoning_content or tool_calls, or name the field in "
     "--ignore_columns"),
)  # fmt: skip
# Where a prompt ends in a text or in tokens, which decides what is learned of them.
_BOUNDARY = re.compile(
    r"(?:.*_)?(?:prompt|source|context|query|question|instruction|prefix|completion|response"
    r"|answer|target)_(?:.*_)?(?:lens?|lengths?|tokens|counts?)"
)
_NESTED = frozenset(
    {"tools", "functions", "system_prompt", "system_message", "enable_thinking",
     "chat_template_kwargs"}
)  # fmt: skip


@lru_cache(4096)
def meaning(name: str, prefix: str) -> str | None:
    """Return "" for metadata, what it is for a field that is refused, None for an unknown one."""
    plain = name.strip().lower()
    for names, what in _REFUSED:
        if names.fullmatch(plain):
            return what
    is_metadata = _METADATA.fullmatch(plain) and (prefix or plain not in _NOT_AT_ROWS)
    return "" if is_metadata else None


def is_blank(value: Any) -> bool:
    """Whether a value holds nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def account(
    fields: Mapping[str, Any], handled: Iterable[str], where: str, prefix: str, source: Source
) -> None:
    """Raise for a field that is neither handled nor metadata.

    Args:
        fields: of a row, a message, a part or a call, without nulls and ignored ones.
        handled: names that are data or honoured.
        where: the place in the row, for the error; "" for the row itself.
        prefix: what `--ignore_columns` writes before a name of these fields.
        source: the row's location.

    Raises:
        DataError: names every such field, what it is, and what to do.
    """
    unknown, refused = [], None
    for name in sorted(fields.keys() - set(handled), key=str):
        what = meaning(name, prefix) if isinstance(name, str) else None
        if is_blank(fields[name]):
            continue
        if what == "":
            _check_metadata(name, fields[name], where, prefix, source)
            continue
        if what is None:
            unknown.append(f"{prefix}{name}")
        elif refused is None:
            refused = f"{where} has {name!r}, which" if where else f"column {name!r}"
            refused += f" is {what}"
    if not (unknown or refused):
        return
    listed = " ".join(unknown)
    problem = f"{where or 'the row'} has fields of unknown meaning: {listed}; if nothing is to be "
    problem += f"learned from them, set --ignore_columns {listed}, else say what they are with "
    problem += "--columns KNOWN=NAME"
    source.fail("; ".join(filter(None, (refused, problem if unknown else None))))


def refuse_boundaries(row: Mapping[str, Any], source: Source) -> None:
    """Raise for a column that says how much of a text, or of its tokens, is the prompt.

    Raises:
        DataError: names the column.
    """
    if name := next(
        (n for n in row if isinstance(n, str) and _BOUNDARY.fullmatch(n.lower())), None
    ):
        source.fail(
            f"column {name!r} tells the prompt from the answer, and all is learned here; write "
            "prompt and completion, or labels, or name it in --ignore_columns"
        )


def _check_metadata(name: str, value: Any, where: str, prefix: str, source: Source) -> None:
    """Raise for a field that is metadata by its name, and by its value is not."""
    place = f"{where} has {name!r}" if where else f"column {name!r}"
    for names, at, values, what in _TELLING:
        if at in (None, prefix) and names.fullmatch(name) and str(value).lower() in values:
            source.fail(f"{place} {value!r}: this is {what}")
    if nested := nested_meaning(value):
        source.fail(
            f"{place} with {nested} in it, which is honoured only as a field of its own; write it "
            f"there, or set --ignore_columns {prefix}{name}"
        )


def nested_meaning(value: Any, depth: int = 0) -> str | None:
    """Return the name in a value that would be honoured outside of it, None where there is none."""
    if isinstance(value, str) and value[:1] == "{" and depth == 0:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None  # a text
    if isinstance(value, dict):
        for name, item in value.items():
            if is_masking(name, item) or (depth == 0 and name in _NESTED and not is_blank(item)):
                return repr(name)
        value = list(value.values())
    items = value if isinstance(value, list | tuple) else ()
    found = (nested_meaning(item, depth + 1) for item in items if isinstance(item, list | dict))
    return next(filter(None, found), None)
