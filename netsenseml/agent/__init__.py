"""What a worker needs to talk to the testbed; imports no torch."""
