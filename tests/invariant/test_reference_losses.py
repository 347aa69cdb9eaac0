import copy
import json
import sys

import pytest

from tests.support.commands import run, succeeds
from tests.support.reference_losses import FOLDER, IMPLEMENTATIONS, STEPS, compare

# One process for each group: they run side by side.
GROUPS = (
    IMPLEMENTATIONS[:2],
    # transformers' own: all but the experts is met by the first two.
    pytest.param(IMPLEMENTATIONS[2:4], marks=pytest.mark.long),
    pytest.param(IMPLEMENTATIONS[4:], marks=pytest.mark.long),  # batched_mm takes a minute
)


@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_the_losses_in_git_are_met_bit_by_bit(names):
    words = succeeds(run(sys.executable, "-m", "tests.support.reference_losses", *names))
    for name in names:
        assert f"{name}: equal" in words


def test_a_change_of_one_bit_is_told():
    before = json.loads((FOLDER / "grouped_mm.json").read_text())
    assert len(before["losses"]) == len(before["grad_norms"]) == STEPS
    assert compare(before, copy.deepcopy(before)) == []
    after = copy.deepcopy(before)
    after["grad_norms"][41] *= 1 + 2**-52
    after["weights_xxh3"] = "0"
    first, second = compare(before, after)
    assert first.startswith("1 of 100 grad_norms differ, the first at step 42, by up to ")
    assert second == "the final weights differ"


def test_keeping_less_for_the_backward_pass_changes_no_bit():
    runs = [json.loads((FOLDER / f"{n}.json").read_text()) for n in IMPLEMENTATIONS[:2]]
    assert compare(*runs) == []
