"""How the orchestrator and the agents of nodes speak to each other: a channel over TLS, messages,
and one time for all."""
