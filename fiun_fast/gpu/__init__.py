"""What a machine with a GPU is asked, in one command: `fiun-fast gpu --out FOLDER`, from a wheel or a checkout.

steps.py     the list: what is asked, in which order, how long each may take
run.py       the command: each step in a process of its own, what came of it, one JSON and one page
child.py     that process: the items of a step one after another, none of which stops the others
machine.py   the GPU as the steps see it, and what stands in for it in a dry run
parity.py    a table of cases, a textbook in plain torch, every backend against it
asked.py     graphs, streams, two devices, offsets beyond 32 bits, memory, the host's time
timed.py     the benchmark cases in GB/s; launch settings of the Triton kernels against the fixed ones
page.py      the page

A dry run does all that on the CPU, in some minutes: with the C++ backend, the CUDA kernels on the tests' shim (in a
checkout) and Triton's interpreter. It shows that the command works, and nothing about a GPU.
"""
