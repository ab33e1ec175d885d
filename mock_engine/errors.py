"""
What can go wrong because of what the user gave us.

Every message says what was found, what is allowed and what to do. The command
line prints it on one line and exits 2; on a token stream it becomes a typed
Dynamo exception (`llm_engine`). Our own bugs are never a `MockEngineError`.
"""

from __future__ import annotations


class MockEngineError(Exception):
    """A problem the user can mend; the base of all errors below."""


class ConfigError(MockEngineError):
    """A flag or setting is wrong, or two of them do not go together."""


class ProfileError(MockEngineError):
    """A profile is unknown, incomplete or corrupt, or cannot be made of what was named."""


class RequestError(MockEngineError):
    """One request can never be served: too long, malformed, or larger than the whole KV cache."""


class ProcessError(MockEngineError):
    """A process that we started did not come up, died, or could not do what it was asked for."""
