"""
What any Dynamo `LLMEngine` is held against. Imports nothing of `mock_engine`.

So far: `bridge`, the way Dynamo's Rust worker really drives a Python engine.
"""
