"""A tokenizer's chat template, rendered by a process of its own with little time and memory.

A template is a program that came with the model. Jinja's sandbox keeps it from Python and files,
but not from looping for ever or making text without end. The process also sees none of the
environment, where tokens are. It is this file run as a script, so it imports nothing of ours.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CPU_S = 20
MEMORY_BYTES = 1 << 30  # beyond what the process has when it begins to render
MAX_CHARACTERS = 32 << 20  # of one conversation
_START_S = 300  # imports on a busy machine


def is_shipped(template: Any) -> bool:
    """Whether a tokenizer's chat template is, to the letter, one that the installed TRL ships."""
    return any(text == template for text in _shipped())  # a dict of templates is none


@cache
def _shipped() -> frozenset[str]:
    found = find_spec("trl")  # importing it takes half a second
    if found is None or found.origin is None:
        return frozenset()
    folder = Path(found.origin).with_name("chat_templates")
    return frozenset(path.read_text(encoding="utf-8") for path in folder.glob("*.jinja"))


def render_apart(
    template: str,
    conversations: Sequence[dict[str, Any]],
    variables: dict[str, str],
    cpu_s: int = CPU_S,
) -> list[str]:
    """Return the text of each conversation.

    Args:
        template: Jinja source.
        conversations: `messages` and `tools` of each, plain JSON; it may have `options` for the
            template and a `location` for errors.
        variables: what the template sees besides, the tokenizer's special tokens.
        cpu_s: seconds of computing for all of them.

    Raises:
        ValueError: the template fails, or takes more time or memory than it may.
    """
    job = {"template": template, "conversations": conversations, "variables": variables}
    command = [sys.executable, "-I", __file__, str(cpu_s)]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, env={},
            timeout=_START_S + cpu_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"its chat template took more than {_START_S + cpu_s} s") from None
    texts = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        failed = conversations[min(len(texts), len(conversations) - 1)].get("location")
        where = f"{failed}: " if failed else ""
        if done.returncode < 0:
            raise ValueError(
                f"{where}its chat template took more than {cpu_s} s of computing, or was killed"
            )
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"{where}its chat template cannot be rendered: {lines[-1][:500]}")
    return texts


def main() -> None:
    """Render what standard input describes; write each text as a line of JSON."""
    from transformers.utils.chat_template_utils import render_jinja_template

    job = json.load(sys.stdin)
    _limit(int(sys.argv[1]))
    for conversation in job["conversations"]:
        rendered: Any = render_jinja_template(
            conversations=[conversation["messages"]], tools=conversation["tools"],
            chat_template=job["template"], **job["variables"], **conversation.get("options", {}),
        )  # fmt: skip
        (text,) = rendered[0]
        if len(text) > MAX_CHARACTERS:
            sys.exit(f"{len(text):,} characters for one conversation")
        sys.stdout.write(json.dumps(text) + "\n")


def _limit(cpu_s: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


if __name__ == "__main__":
    main()
