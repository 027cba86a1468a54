"""What is wrong with what a user gave: a recipe, a file, an argument."""


class UserError(ValueError):
    """Says what was expected, what came and what to do. Commands print it as it is, without a traceback.

    Anything else that is raised is a defect of this program, or of a library, and keeps its traceback.
    """
