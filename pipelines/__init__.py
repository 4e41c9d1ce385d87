"""Logs to jagged batches."""
