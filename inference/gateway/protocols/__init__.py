"""What SGLang, vLLM and OpenAI clients send and get, and how one is made of another.

Read sglang.py first.
"""
