"""What the shim and the front door share of HTTP: which connections they keep, and which bodies they begin to read."""
