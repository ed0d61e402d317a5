"""`python -m oneblock`: the same as the command `oneblock`."""

import sys

from oneblock.cli import main

if __name__ == "__main__":
    sys.exit(main())
