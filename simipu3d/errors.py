"""What a user can cause, and what the command lines say about it.

A tool prints a `UserError` as one line `error: ...` and ends with status 2; everything else is our bug and keeps its
traceback. The message names the file or key, says what was found, and the way out.
"""


class UserError(ValueError):
    """Something the user can mend: a wrong key, a missing file, a package that is not installed."""


class BadFrameError(UserError):
    """One frame of a data set cannot be used. Training follows `data.on_bad_frame` when it meets one."""


class Stopped(BaseException):
    """A signal ended the work before its end. No `Exception`, like `KeyboardInterrupt`: nobody who mends errors catches it.

    Args:
        message: the one line about it.
        status: the exit status, 128 + the signal's number, or of SIGTERM where another means the same.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.message, self.status = message, status
