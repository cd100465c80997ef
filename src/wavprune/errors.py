"""The one error that means: what was given is not allowed."""


class WavpruneError(ValueError):
    """What the caller gave is not allowed; the message repeats it and says what is.

    Raised before anything has changed. Every other exception is a defect of this library or of
    something below it: the command line turns only this one into one line and exit status 2.
    """
