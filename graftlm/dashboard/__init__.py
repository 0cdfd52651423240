"""The board: one page over folders of runs, sweeps and comparisons, and a store of adapters. It only reads files.

folders.py        which folders may be read, what lies in them, and the check before a file is opened
metrics_log.py    metrics.jsonl of a run that goes on: only what is new is read; curves of a bounded number of points
run_state.py      running, finished, stopped or failed, and how that is known
runs.py           a run as plain values: a line of the list, and everything about it
experiments.py    sweeps and comparisons as plain values
lineage.py        the store as plain values: versions, aliases, parents, the run that made each
contents.py       all of it together, kept between requests
page.py           the page: its files, and all of it in one file
app.py            HTTP; playground.py hands requests on to a running `graft serve`
page/             the page itself; page/uplot/ is the charting library, with its licence

A file may be half written, damaged or hostile: what cannot be read is a sentence on the page, never the end of the board.
"""
