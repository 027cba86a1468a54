"""The error of a user: in a recipe, a file or an argument."""

TRY_AGAIN = 75  # exit code where the same command may go on: sysexits.h calls it a temporary failure


class UserError(ValueError):
    """Says what was expected, what came and what to do. Commands print only its message, without a traceback.

    Any other exception is a defect of this program or of a library, and keeps its traceback.

    Attributes:
      reason: the message without `advice`, for a caller who has other advice.
      exit_code: of a command that ends by it.
    """

    exit_code = 2

    def __init__(self, reason: str = "", *, advice: str = "") -> None:
        """Makes the message of what is wrong and, if it is given, of what to do about it."""
        super().__init__(f"{reason}; {advice}." if advice else reason)
        self.reason = reason
