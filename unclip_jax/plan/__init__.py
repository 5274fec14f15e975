"""What a config needs on devices that are not here: memory, FLOPs, collectives and a predicted step time.

    chips      the devices: data sheets, TPU slices, GPUs
    abstract   a run as shapes with shardings
    steps      what a train or sample step of it takes
    search     which mesh, batch size and remat policies suit it
    table      all of that for reading

For a TPU slice the exact train or sample step is compiled ahead of time by libtpu (extra `[tpu]`), which needs no TPU;
bytes are then the compiler's. For GPUs everything is arithmetic on shapes, and said to be so. Times are predictions
from data sheets, never measurements.
"""
