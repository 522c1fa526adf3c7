"""Exceptions of the package."""


class TavError(ValueError):
    """A mistake the user can fix; the message is one line naming the field, its value and the remedy."""


class OutOfMemory(TavError):
    """A step that doesn't fit into memory."""


class Cancelled(Exception):
    """Raised by a callback to stop a running step; whatever was computed so far has been kept."""
