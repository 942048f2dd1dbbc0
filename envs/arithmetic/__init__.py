"""Short arithmetic for a tiny model made on the spot: the demo's and the tests' workload."""
