"""`python -m sencache` is the command `sencache`."""

import sys

from sencache.command import main

if __name__ == "__main__":
    sys.exit(main())
