"""What the network is like right now: the kernel's view of the sockets, and a bandwidth
estimate."""
