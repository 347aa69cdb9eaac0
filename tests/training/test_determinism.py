import os
import subprocess
import sys

PROGRAM = """
import torch
from qwen3_sft.training.determinism import make_deterministic
make_deterministic()
assert torch.are_deterministic_algorithms_enabled()
assert not torch.utils.deterministic.fill_uninitialized_memory
import os
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["FLASH_ATTENTION_DETERMINISTIC"])
from tests.support.training import make_trainer
import inspect, tempfile, textwrap
from pathlib import Path
from qwen3_sft.demo.model import tiny_config, tiny_model, train_tokenizer
tokenizer = train_tokenizer([inspect.getsource(textwrap)], 512)
model = tiny_model(tiny_config(len(tokenizer), hidden_size=64, num_hidden_layers=2))
for optim in ("adamw_torch_8bit", "adafactor"):
    given = {"optim": optim, "optimizer_in_backward": True, "clip": "delayed", "max_grad_norm": 1.0}
    make_trainer(model, tokenizer, Path(tempfile.mkdtemp()), max_steps=2, aux=0.01, **given).train()
print("trained")
"""


def test_all_that_a_run_does_is_allowed():
    """An operator without a deterministic form raises there; what only a GPU runs is not seen."""
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == ":16:8 1"
    assert run.stdout.splitlines()[-1] == "trained"
