"""Variables of the environment that mean nothing are refused by name."""

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.options.variables import check_launcher_variables, is_dry_run, named_launch_file


@pytest.mark.parametrize(
    ("word", "is_dry"), [("1", True), ("true", True), ("yes", True), ("0", False), ("no", False)]
)
def test_dry_run(word, is_dry):
    assert is_dry_run({"DRY_RUN": word}) is is_dry
    assert is_dry_run({}) is False


@pytest.mark.parametrize("word", ["", "maybe", "2", "on"])
def test_a_dry_run_that_is_neither(word):
    with pytest.raises(UsageError, match=f"^DRY_RUN={word}: set it to 1, or unset it"):
        is_dry_run({"DRY_RUN": word})


def test_launch_file():
    assert named_launch_file({}) is None
    assert named_launch_file({"ACCELERATE_CONFIG": "a.json"}) == "a.json"
    for word in ("", " "):
        with pytest.raises(UsageError, match="ACCELERATE_CONFIG is set but empty"):
            named_launch_file({"ACCELERATE_CONFIG": word})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("word", ["", "abc", "-1", "1.5"])
def test_what_no_launcher_sets(name, word):
    with pytest.raises(UsageError, match=f"^{name}={word}: must be a whole number"):
        check_launcher_variables({name: word})
    check_launcher_variables({name: "1"})
