"""What runs on each machine of a lab while a cell runs: changes of its links, samples of their
counters and of its load."""
