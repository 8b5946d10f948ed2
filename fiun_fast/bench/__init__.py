"""Benchmarks: this package next to the code people run today and to the best they could write in plain torch.

`fiun-fast bench` runs them anywhere the package is installed; the repository's bench/ drives the same code through
pytest-benchmark and keeps results. It is a floor above the public API and uses nothing below it.

baselines.py    the competitors, written as existing code writes them
dampening.py    cases a to f and the scaling rows: one model, sparse selection, DAGs, a large flat model
fishers.py      cases g and h: accumulating squared gradients, merging Fishers
exact.py        case k: the empirical Fisher of samples, and of the head alone
whole.py        cases i and j: compiling a plan, and everything from mini-batches to dampened models
cases.py        the list of cases and their sizes
measure.py      how a case is checked and timed
memory.py       peak extra memory, in a process of its own
results.py      rows, files, the printed table
"""
