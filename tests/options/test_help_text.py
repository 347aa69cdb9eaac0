"""What --help lists: every option that is taken in one group, ours first, nothing refused."""

from __future__ import annotations

from collections import Counter

import pytest

from qwen3_sft.options.groups import GROUPS
from qwen3_sft.options.help_text import help_for, help_text
from qwen3_sft.options.judged_options import REFUSED
from qwen3_sft.options.listing import listing


def listed(text: str) -> list[str]:
    """The options of a help text, in their order."""
    return [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]


def test_every_option_that_is_taken_stands_in_one_group():
    names = Counter(name for group in GROUPS for name in group.names(is_whole=True))
    assert [name for name, count in names.items() if count > 1] == []
    taken = listing().keys() - REFUSED.keys()
    assert not taken - names.keys(), "put them into a group of options/groups.py"
    assert not names.keys() - taken, "refused or gone: take them out of options/groups.py"


def test_ours_are_ours_and_come_first():
    ours = {name for name, option in listing().items() if option.is_ours}
    assert {name for group in GROUPS for name in group.ours.split()} == ours - REFUSED.keys()
    names = listed(help_text())
    for group in GROUPS:
        first = names.index(group.ours.split()[0])
        assert names[first : first + len(group.ours.split())] == group.ours.split()


def test_rare_ones_wait_behind_help_all():
    rare = {name for group in GROUPS for name in group.rare}
    assert rare
    assert rare.isdisjoint(listed(help_text()))
    assert set(listed(help_text(is_whole=True))) == listing().keys() - REFUSED.keys()
    assert "--help_all" in help_text()


@pytest.mark.parametrize("columns", ["40", "90", "300"])
def test_lines_are_neither_cut_nor_endless(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    longest = max(len(line) for line in help_text(is_whole=True).splitlines())
    assert longest <= min(max(int(columns), 80), 100)


def test_every_option_tells_its_default_and_choices():
    parts = help_text(is_whole=True).split("\n  --")[1:]
    described = {part.split()[0]: " ".join(part.split()) for part in parts}
    for name, option in listing().items():
        if name in REFUSED:
            continue
        assert "default" in described[name], name
        for choice in option.choices:
            assert choice in described[name], (name, choice)
    assert "(one of drop, error, truncate; default drop)" in described["overlong"]
    assert "cosine_with_min_lr" in described["lr_scheduler_type"]


def test_who_asks_for_help():
    assert help_for(["--seed", "1"]) is None
    assert help_for(["--seed", "1", "-h"]) == help_for(["--help"]) == help_text()
    assert help_for(["--help_all"]) == help_for(["--help-all"]) == help_text(is_whole=True)
