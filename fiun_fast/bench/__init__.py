"""Benchmarks: this package next to the code people run today and to the best they could write in plain torch.

`fiun-fast bench` runs them anywhere the package is installed; the repository's scripts in bench/ use the same parts.
Beside the public API they use `files`, `arguments`, `errors` and the demo's models.

baselines.py    the competitors, written as existing code writes them
dampening.py    cases a to f and the scaling rows: one model, sparse selection, DAGs, a large flat model
fishers.py      cases g, h and k: accumulating squared gradients, merging Fishers, Fishers of samples and of a head
whole.py        cases i and j: compiling a plan, and everything from mini-batches to dampened models
measure.py      how a case is checked, timed and weighed
files.py        what was measured on; JSON files, tables in pages
results.py      rows, records, the printed table
run.py          the list of cases and their sizes; one case after another; the command
"""
