"""Errors of training and decoding."""

from heedful.errors import HeedfulError


class TrainError(HeedfulError, ValueError):
    """Error of a run that cannot start, continue or be used; the message has the fix.

    >>> import heedful as hf
    >>> try:
    ...     hf.TrainConfig(steps=0)
    ... except hf.TrainError as error:
    ...     print(error)
    train.steps must be positive, not 0
    """


class Interrupted(HeedfulError):
    """A signal (Ctrl-C) has stopped the run, which is saved: the same call of `fit` resumes it.

    code: exit status of a process that ends with this exception.

    >>> import heedful as hf
    >>> raise hf.Interrupted("stopped at step 7, saved", 130)
    Traceback (most recent call last):
    heedful.train.errors.Interrupted: stopped at step 7, saved
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def require(condition: bool, message: str) -> None:
    """Raise TrainError unless the condition holds."""
    if not condition:
        raise TrainError(message)
