"""``python -m elastune``."""

from elastune.cli import main

main()
