"""`python -m fewbits` is the `fewbits` command."""

import sys

from fewbits.cli import main

sys.exit(main())
