"""The one error type that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can mend; the message is one line that says what to do."""
