"""`python -m serve` is the `serve` command."""

import sys

from serve.cli import main

sys.exit(main())
