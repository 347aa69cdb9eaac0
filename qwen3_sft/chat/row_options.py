"""What a row says about its own training, compared with what the family and the run can do."""

from __future__ import annotations

from qwen3_sft.chat.samples import Conversation
from qwen3_sft.chat.templates import ChatFormat
from qwen3_sft.errors import DataError


def check_row_options(
    conversation: Conversation, fmt: ChatFormat, train_on: str, location: str
) -> None:
    """Raise for a row that asks for what will not happen.

    Raises:
        DataError: it masks answers but every token is trained, it thinks but the family does not,
            or it does not think but the family always does.
    """
    if conversation.masked and train_on == "all":
        raise DataError(
            f"{location}: the row's loss flags mask answers, but --train_on all labels every token; "
            "set --train_on assistant, or name the flags in --ignore_columns"
        )
    if conversation.enable_thinking and not fmt.thinks:
        raise DataError(
            f"{location}: enable_thinking is true, but this family of models has no thinking; use a "
            "thinking model, or set --ignore_columns enable_thinking"
        )
    if conversation.enable_thinking is False and fmt.prompt_opens_think:
        raise DataError(
            f"{location}: enable_thinking is false, but this model's prompt always opens <think>; "
            "use a model with both modes, or set --ignore_columns enable_thinking"
        )
