"""The errors that a person is meant to read: one line that names the thing and what to do."""


class UserError(Exception):
    """Wrong input. Commands print its one line and exit with code 2."""


class RunError(Exception):
    """A run that could not go on (a full disk, a non-finite loss). Printed; exit code 1."""
