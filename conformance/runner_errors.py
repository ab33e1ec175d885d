"""What a check raises to say that there is nothing to judge."""


class NotHere(Exception):
    """The rule does not apply to this engine after all. The message says why."""
