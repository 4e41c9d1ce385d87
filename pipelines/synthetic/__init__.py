"""Streams made from a seed, at any scale, whose definitions are published."""
