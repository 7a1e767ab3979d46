"""Several conversions, one after the other in the same processes, which take long to start: each argument is one's."""

import shlex
import sys

from linearize import cli

for line in sys.argv[1:]:
    sys.argv = ["linearize", "convert", *shlex.split(line)]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
