"""`python -m api.cli` is `spillway`."""

from api.cli import main

main()
