"""The errors that a person is meant to read: one line that names the thing and what to do."""


class UserError(Exception):
    """Wrong input. Commands print its one line and exit with code 2."""


class RunError(Exception):
    """A run that could not go on (a full disk, a non-finite loss). Printed; exit code 1."""


class NonFiniteLoss(ArithmeticError):
    """A loss term or gradient is infinite or not a number; nothing was changed by its update.

    A run that meets it saves its state and ends with a `RunError`.
    """

    def __init__(self, term: str, value: float):
        super().__init__(f"the {term} is {value}")
        self.term = term
