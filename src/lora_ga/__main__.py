"""`python -m lora_ga` is the `lora-ga` command."""

import sys

from lora_ga.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
