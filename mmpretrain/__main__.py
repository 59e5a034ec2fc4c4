"""`python -m mmpretrain` is the `mmpretrain` command."""

import sys

from mmpretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
