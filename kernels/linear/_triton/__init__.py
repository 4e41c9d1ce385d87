"""Linear map in plain Triton, for every GPU and for the interpreter."""
