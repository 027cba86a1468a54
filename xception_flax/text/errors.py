"""The error of a user: in a recipe, a file or an argument."""


class UserError(ValueError):
    """Says what was expected, what came and what to do. Commands print only its message, without a traceback.

    Any other exception is a defect of this program or of a library, and keeps its traceback.
    """
