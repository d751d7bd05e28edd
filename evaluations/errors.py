"""What is wrong with an evaluation's input."""


class EvaluationError(ValueError):
    """Bad input from a user, said in one line that names the file or flag, what is wrong and what to do."""
