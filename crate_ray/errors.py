"""The one exception for what a user can mend: its message is a clear sentence of what, where, and what to do."""


class UserError(Exception):
    """Wrong input or surroundings. Jobs print the message without a traceback and exit with status 2."""
