"""The base class of heedful's exceptions."""


class HeedfulError(Exception):
    """Base of all exceptions of heedful: `DataError`, `ModelError`, `TrainError` and `Interrupted`.

    The message is one line that names the field or the file, its value, the problem and the fix.
    DataError, ModelError and TrainError are also ValueErrors.

    >>> import heedful as hf
    >>> try:
    ...     hf.ModelConfig(width=-1)
    ... except hf.HeedfulError as error:
    ...     print(type(error).__name__, error, sep=": ")
    ModelError: model.width must be positive, not -1
    """
