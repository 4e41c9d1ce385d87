"""Public datasets: from the publisher's files to an event log."""
