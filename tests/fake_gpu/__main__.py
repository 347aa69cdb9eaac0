"""Runs the exercises on a GPU that is not there; `python -m tests.fake_gpu FOLDER [PYTEST ...]`.

Writes FOLDER/executed.json: of every CUDA-only place whether it was executed. Exits as pytest.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.fake_gpu import stand_in
from tests.fake_gpu.cuda_only import cuda_only_places
from tests.fake_gpu.marks import watch
from tests.support.source_tree import ROOT, modules


def main(folder: Path, *arguments: str) -> int:
    files = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in modules().values()}
    with stand_in.loaded(folder):
        places = cuda_only_places(files)
    executed = watch(places, ROOT)
    import pytest

    code = pytest.main(
        [str(Path(__file__).parent), "-o", "python_files=exercise_*.py", "-p",
         "tests.fake_gpu.fixtures", "-p", "no:cacheprovider", "--tb=short", *arguments]
    )  # fmt: skip
    found = {
        f"{place}:{place.column + 1}": {
            "source": files[place.file].splitlines()[place.line - 1].strip(),
            "executed": place in executed,
        }
        for place in places
    }
    (folder / "executed.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return code


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
