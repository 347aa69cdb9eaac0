from tests.support import faults


def test_the_table_in_the_documentation_is_that_of_the_tests():
    text = faults.DOCUMENT.read_text("utf-8")
    assert faults.documented(text) == text, "run: python -m tests.support.faults"
    assert faults.table().count("\n") > 20
