"""Runs beside mlx-lm: `in_mlx.py FOLDER IDS OUT` loads an export and tells of it."""

import json
import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load

folder, ids, out = sys.argv[1:]
model, tokenizer = load(folder)
model.set_dtype(mx.float32)
logits = model(mx.array(np.load(ids).astype(np.int32))[None])[0]
np.save(f"{out}.npy", np.array(logits.astype(mx.float32)))
told = {
    "rope_theta": model.args.rope_theta,
    "eos": sorted(tokenizer.eos_token_ids),
    "ids": tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n"),
}
with open(f"{out}.json", "w", encoding="utf-8") as file:
    json.dump(told, file)
