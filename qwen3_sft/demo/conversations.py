"""Real instruction data without a download: conversations about Python's own standard library.

Every public function, class and method with a docstring becomes one conversation: "What does
`textwrap.dedent` do?", answered by the first paragraph of its documentation. Where there
is a second paragraph, a second question asks for it; every seventh answer comes after some
reasoning.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Modules whose import has no visible effect and that exist in Python 3.11 to 3.13.
MODULES = (
    "abc", "argparse", "ast", "asyncio", "base64", "bisect", "builtins", "bz2", "calendar",
    "cmath", "cmd", "codecs", "collections", "collections.abc", "colorsys", "concurrent.futures",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib",
    "dis", "doctest", "email.message", "email.utils", "enum", "filecmp", "fnmatch", "fractions",
    "ftplib", "functools", "getopt", "gettext", "glob", "graphlib", "gzip", "hashlib", "heapq",
    "hmac", "html", "html.parser", "http.client", "http.cookies", "http.server", "importlib.util",
    "inspect", "io", "ipaddress", "itertools", "json", "linecache", "locale", "logging",
    "logging.handlers", "lzma", "mailbox", "math", "mimetypes", "multiprocessing.pool", "netrc",
    "numbers", "operator", "os", "os.path", "pathlib", "pdb", "pickle", "pickletools", "pkgutil",
    "platform", "plistlib", "poplib", "pprint", "profile", "pstats", "queue", "quopri", "random",
    "re", "reprlib", "sched", "secrets", "selectors", "shelve", "shlex", "shutil", "signal",
    "smtplib", "socket", "socketserver", "sqlite3", "ssl", "stat", "statistics", "string",
    "stringprep", "struct", "subprocess", "symtable", "sys", "sysconfig", "tarfile", "tempfile",
    "textwrap", "threading", "time", "timeit", "token", "tokenize", "trace", "traceback",
    "tracemalloc", "types", "typing", "unicodedata", "unittest", "unittest.mock", "urllib.parse",
    "urllib.request", "uuid", "warnings", "wave", "weakref", "webbrowser", "xml.dom.minidom",
    "xml.etree.ElementTree", "xml.sax.saxutils", "xmlrpc.client", "zipfile", "zlib",
)  # fmt: skip

_MAX_ANSWER = 400  # characters: the demo model learns short answers faster


def conversations() -> Iterator[dict[str, Any]]:
    """Yield rows of the `messages` format, in the same order on every run."""
    for index, item in enumerate(_documented_objects()):
        first, *more = item.paragraphs
        answer = {"role": "assistant", "content": first}
        if index % 7 == 3:
            answer["reasoning_content"] = (
                f"`{item.name}` is a {item.kind} of Python's standard library. "
                "I recall its documentation."
            )
        messages = [{"role": "user", "content": f"What does `{item.name}` do?"}, answer]
        if more:
            messages += [
                {"role": "user", "content": "Tell me more."},
                {"role": "assistant", "content": more[0]},
            ]
        yield {"messages": messages}


def write_conversations(path: Path) -> int:
    """Write the conversations as JSON lines; return how many there are."""
    rows = [json.dumps(row, ensure_ascii=False) for row in conversations()]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)


@dataclass(frozen=True)
class _Documented:
    name: str
    kind: str
    paragraphs: list[str]


def _documented_objects() -> Iterator[_Documented]:
    """Yield what has a readable docstring, each docstring once."""
    seen: set[str] = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, kind, member in _members(module):
            paragraphs = _paragraphs(inspect.getdoc(member))
            if paragraphs and paragraphs[0] not in seen:
                seen.add(paragraphs[0])
                yield _Documented(name, kind, paragraphs)


def _members(module: ModuleType) -> Iterator[tuple[str, str, object]]:
    for name, member in sorted(vars(module).items()):
        home = getattr(member, "__module__", module.__name__)
        if name.startswith("_") or (home != module.__name__ and home in MODULES):
            continue  # private, or imported from a module that has its own turn
        if inspect.isroutine(member):
            yield f"{module.__name__}.{name}", "function", member
        elif inspect.isclass(member):
            yield f"{module.__name__}.{name}", "class", member
            for attribute, value in sorted(vars(member).items()):
                if not attribute.startswith("_") and inspect.isroutine(value):
                    yield f"{module.__name__}.{name}.{attribute}", "method", value


def _paragraphs(documentation: str | None) -> list[str]:
    """Return the leading paragraphs that read as prose; a bare signature is not."""
    paragraphs = []
    for block in (documentation or "").strip().split("\n\n"):
        text = re.sub(r"\s+", " ", block).strip()
        if not 20 <= len(text) <= _MAX_ANSWER or re.match(r"^[\w.]+\(|^>>>", text):
            break
        paragraphs.append(text)
    return paragraphs


if __name__ == "__main__":
    write_conversations(Path(sys.argv[1]))
