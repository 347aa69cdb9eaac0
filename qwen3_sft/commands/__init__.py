"""What `qwen3-sft plan`, `resume`, `data inspect` and `export` do with their words.

`qwen3-sft train` starts processes: `launch/`. Nothing here is used by a run.
"""
