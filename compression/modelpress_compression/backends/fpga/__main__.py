"""`python -m modelpress_compression.backends.fpga`: makes the machine code of the tools, once for all jobs."""

from modelpress_compression.backends.fpga.tools import prepare

if __name__ == "__main__":
    prepare(print)
