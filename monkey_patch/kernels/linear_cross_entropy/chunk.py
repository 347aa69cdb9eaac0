"""How many positions have their logits in memory at the same time."""

from __future__ import annotations

CHUNK_BYTES = 5 * 2**28
"""Most bytes of one chunk's logits, 1.25 GiB: as much as the float32 sum of the weight's gradient.

The kernel keeps a logit in the dtype of the product and writes the gradient over it, so that with
Qwen3's 151,936 entries 4,096 positions in bfloat16 (1.16 GiB) take the place of the 1,024 that
float32 logits and a temporary of their size leave. Each chunk reads the weight twice and reads and
writes the sum, 12 bytes per entry of the weight: 0.9 MB per position at 4,096, 3.6 MB at 1,024.
Twice the chunk would save 0.5 MB of some 2.8 and cost another GiB.
"""


def tokens_per_chunk(vocab_size: int, logit_bytes: int) -> int:
    """Return the largest power of two of positions whose logits take `CHUNK_BYTES`; at least 1.

    Rows are mostly powers of two too, and then no chunk is a short one.

    Args:
        vocab_size: V.
        logit_bytes: per logit at the highest point, temporaries included.
    """
    fitting = CHUNK_BYTES // (vocab_size * logit_bytes)
    return 1 << max(fitting.bit_length() - 1, 0)
