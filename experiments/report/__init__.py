"""Reports, in one form for every study: a tidy table of results, sections and one page.

The report module of a study has `report(folder)`, which turns the files of a folder into a
`page.Report`.
"""
