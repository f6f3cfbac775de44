"""`python -m arriero`."""

from arriero.cli.main import main

main()
