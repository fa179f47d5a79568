"""The node agent: it runs on each machine of a lab over several, owns what the lab has there, and
obeys the orchestrator."""
