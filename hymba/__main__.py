"""`python -m hymba` is the command `hymba`."""

from hymba.cli import main

main()
