"""An LLM inference engine without a GPU."""
