"""The READMEs' numbers, recomputed from the stored rows by other code than that of the reports.

What no stored row has (loops beside PyTorch, accuracies of fine-tuning, losses of `family.widths`)
is not checked, and the READMEs say of it that its rows are not stored.
"""

import functools
import re

import numbers_family
import numbers_grok
import numbers_language
import pytest
import sentences_grok
from stored_rows import ROOT, STUDIES

NUMBER = r"[+−]?\d+\.\d+"
INTERVAL = re.compile(rf"({NUMBER}) ?(?:nats |points |\(fit )?\[({NUMBER}), ({NUMBER})\]")
# By a README's section and the place of a table in it: the last cells of each of its rows; None
# where no stored row tells.
TABLES = numbers_grok.TABLES | numbers_family.TABLES | numbers_language.TABLES


def tables(study, section):
    """The tables of a README's section, cell by cell, without their headings."""
    text = (STUDIES / study / "README.md").read_text(encoding="utf-8").replace("**", "")
    (own,) = (
        of for of in re.split(r"^#+ ", text, flags=re.MULTILINE) if of.split("\n")[0] == section
    )
    blocks = re.findall(r"^\|.*(?:\n\|.*)*", own, re.MULTILINE)
    return [
        [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()[2:]]
        for block in blocks
    ]


@pytest.mark.parametrize(("study", "section", "place"), TABLES)
def test_a_table_is_what_the_rows_tell(study, section, place):
    shown, expected = tables(study, section)[place], TABLES[study, section, place]()
    assert len(shown) == len(expected)
    for line, row in zip(shown, expected, strict=True):
        told = line[len(line) - len(row) :]
        if section == "Diagnostics":  # whose first cell ends with what it was at first
            told = [row[0] and told[0][-len(row[0]) :], *told[1:]]
        assert [t if r is not None else None for t, r in zip(told, row, strict=True)] == row


@functools.cache
def sentences():
    return [
        *sentences_grok.sentences(),
        *numbers_family.sentences(),
        *numbers_language.sentences(),
    ]


@functools.cache
def intervals():
    """Every one that the tables or the sentences have."""
    texts = [cell for rows in TABLES.values() for row in rows() for cell in row if cell]
    texts += [text for _, text in sentences()]
    return {found for text in texts for found in INTERVAL.findall(text)}


def text_of(study):
    path = STUDIES / study / "README.md" if study else ROOT / "README.md"
    return " ".join(path.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("study", ["", "grok", "family", "pretrain", "finetune"])
def test_sentences_have_the_numbers_of_the_rows(study):
    told = [" ".join(sentence.split()) for name, sentence in sentences() if name == study]
    assert told and not [sentence for sentence in told if sentence not in text_of(study)]


@pytest.mark.parametrize("study", ["", "grok", "family", "pretrain", "finetune"])
def test_every_interval_is_one_of_the_rows(study):
    """Wherever a ratio or a difference is told with its interval, all three numbers are right."""
    shown = set(INTERVAL.findall(text_of(study)))
    assert shown and shown <= intervals()
