"""An SGLang server's agent, which follows weight events, and the pool's front door."""
