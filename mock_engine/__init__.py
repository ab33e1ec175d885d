"""
An LLM inference engine without a GPU.

`mock_engine.MockLLMEngine` is the Dynamo engine; it is imported when asked for, since it brings Dynamo with it.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "MockLLMEngine":
        from mock_engine.llm_engine import MockLLMEngine

        return MockLLMEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
