"""``python -m loramem_cli``."""

from .main import main

main()
