"""Linear map for Hopper GPUs, in Gluon."""
