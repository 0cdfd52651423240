"""One module a command: the function that the command line and Python both call."""
