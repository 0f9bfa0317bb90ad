"""`meshwright` and `python -m meshwright`."""

import os
import sys

# How PyTorch's allocator lays out a GPU's memory, unless somebody says otherwise: in ranges that grow. Pieces of fixed
# size are split by what outlives them, and left 1 to 7 GB more unused (docs/benchmarks.md).
ALLOCATOR = "expandable_segments:True"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def main() -> None:
    """Run the command line; an interrupt is as quiet while it is still being loaded."""
    # Before anything imports PyTorch, in this process or in those that it starts.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
    try:
        from meshwright.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
