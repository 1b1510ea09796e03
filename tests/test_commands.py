"""What the commands of all studies share."""

import pytest

from experiments.commands import print_error


@pytest.mark.parametrize("text", ["no param [blocks]", "[/tmp/x] is no folder", "word " * 40])
def test_an_error_is_printed_to_the_letter_and_in_one_line(text, capsys):
    print_error(ValueError(text))
    assert capsys.readouterr() == ("", f"error: {text}\n")
