"""What happens to a finished adapter: compress, merge, convert, serve."""
