"""Runs in transformers 4: `in_transformers4.py FOLDER IDS OUT` loads an export and tells of it."""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, ids, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
)
with torch.no_grad():
    logits = model.eval()(torch.from_numpy(np.load(ids))[None], use_cache=False).logits[0]
np.save(f"{out}.npy", logits.numpy())
told = {
    "missing": sorted(info["missing_keys"]),
    "unexpected": sorted(info["unexpected_keys"]),
    "rope_theta": model.config.rope_theta,
    "rope_scaling": model.config.rope_scaling,
    "num_experts": model.config.num_experts,
    "dtype": str(model.config.dtype),
    "inv_freq": model.model.rotary_emb.inv_freq.tolist(),
    "attention_scaling": model.model.rotary_emb.attention_scaling,
    "config_eos": model.config.eos_token_id,
    "generation_eos": model.generation_config.eos_token_id,
    "tokenizer": [tokenizer.eos_token, tokenizer.pad_token],
    "ids": tokenizer("<|im_start|>user\nHi<|im_end|>\n").input_ids,
}
with open(f"{out}.json", "w", encoding="utf-8") as file:
    json.dump(told, file)
