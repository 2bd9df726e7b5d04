"""``python -m quantize``: see :mod:`quantize.shell.commandline`."""

import sys

from quantize.shell.commandline import main

if __name__ == "__main__":
    sys.exit(main())
