"""Operators: pure functions of tensors, without configuration, parameters or process groups."""
