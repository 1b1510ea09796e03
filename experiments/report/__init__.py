"""One report for every study: a tidy table of results, sections and one page.

A study's module has `report(folder)`, which turns the folder's files into a `page.Report`.
"""
