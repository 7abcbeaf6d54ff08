"""`python -m sky_core` is the `sky` command."""

from sky_core.cli.main import main

main()
