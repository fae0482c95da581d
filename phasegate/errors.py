"""Errors for people."""


class UserError(ValueError):
    """A file or a value that can't be used: one sentence with its name, its value and what would be right."""
