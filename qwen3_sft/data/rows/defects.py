"""One table for all formats: what becomes of a row that has a defect.

A row in which nothing is to be learned is left out and counted, for its loss is none. Any other
defect is a mistake that somebody should see: an error, or with `--on_bad_row drop` left out,
counted, and listed with its place and reason. What the row's own flags ask for is no defect, and
`--max_drop_fraction` does not count it.
"""

from __future__ import annotations

from qwen3_sft.chat.samples import Dropped
from qwen3_sft.data.rows.loss_flags import BY_FLAG

BLANK_ANSWER = Dropped("a blank answer")
BLANK_TEXT = Dropped("a blank text")
NO_TOKENS = Dropped("no tokens")
ONE_TOKEN = Dropped("one token, nothing to predict")
BAD_ROW = "a defect (--on_bad_row drop)"

ASKED_FOR = (BY_FLAG.reason,)
MOST_LISTED = 1000  # dropped rows that a report names one by one
