"""``python -m quantize``: see :mod:`quantize.shell.cli.commandline`."""

import sys

from quantize.shell.cli.commandline import main

if __name__ == "__main__":
    sys.exit(main())
