"""``python -m graftq``: the command line."""

import sys

from graftq.plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
