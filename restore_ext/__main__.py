"""`python -m restore_ext` is `restore-ext`."""

import sys

from restore_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
