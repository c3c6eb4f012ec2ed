"""`python -m compressor` is the command `compress`."""

from compressor.cli import main

raise SystemExit(main())
