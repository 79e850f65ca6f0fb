"""Entry points: `python -m steps.NAME` runs this file first, before torch loads its threads' runtime."""

import os

# A thread that waits for others then sleeps. By default it spins. Where other processes need its core, it so keeps the
# threads that it waits for from working: beside such processes, on two cores, a step of the lab's training took 14 s
# spinning and 0.4 s sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The threads of numpy's matrices spin, too, and nothing here has matrices large enough to need several: beside other
# processes, 1,000 trials of a search took 194 s with two threads and 53 s with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
