"""An SGLang server's agent, which follows weight events, and the pool's front door.

Read agent/agent.py and gateway/app.py.
"""
