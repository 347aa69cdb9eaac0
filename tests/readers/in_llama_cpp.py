"""Runs llama.cpp's converter: `in_llama_cpp.py SOURCE FOLDER OUT` writes OUT.gguf, .json and .npz.

The converter knows a tokenizer by a hash of what it makes of one text, and knows no tiny ones; ours
has Qwen's pre-tokenizer, so it is told that. The rest is the converter as it is.
"""

import json
import runpy
import sys

import numpy as np

source, folder, out = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]

from conversion import base  # noqa: E402

base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = ["convert", folder, "--outfile", f"{out}.gguf", "--outtype", "f32"]
runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")

from gguf import GGUFReader  # noqa: E402

reader = GGUFReader(f"{out}.gguf")
told = {}
for name, field in reader.fields.items():
    if len(field.data) == 1:
        value = field.contents()
        told[name] = value if isinstance(value, str | int | float | bool) else str(value)
np.savez(f"{out}.npz", **{tensor.name: np.array(tensor.data) for tensor in reader.tensors})
with open(f"{out}.json", "w", encoding="utf-8") as file:
    json.dump(told, file)
