"""`python -m stateline` is the `stateline` command."""

import sys

from stateline.cli import main

if __name__ == "__main__":
    sys.exit(main())
