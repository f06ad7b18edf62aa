"""The `lora-ga` command: argument parsing and calls of the library."""
