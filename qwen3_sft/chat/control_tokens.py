"""Qwen's own control tokens, which no content can forge.

Every other added token of a tokenizer is somebody's vocabulary: content that spells it means it.
"""

from __future__ import annotations

# The 26 of Qwen3 in the order of their ids, 151643 to 151668 in the released tokenizers; the same
# in Qwen3-Coder and Qwen3-VL. Those without bars are not `special` upstream, so that decoding with
# skip_special_tokens keeps them. Source: tokenizer_config.json of Qwen/Qwen3-30B-A3B.
QWEN3_CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
