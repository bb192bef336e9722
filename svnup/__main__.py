"""`python -m svnup`, the same as `svnup`."""

import sys

from svnup.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
