"""The command line: one thin file per command, the console, and the table from error type to exit code."""
