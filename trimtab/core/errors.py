"""What can go wrong for a user, each with the exit code that the command line gives it.

`UserError` (2): bad input; the message says what was asked, what was found and what to do.
`BudgetError` (3): the input is fine, but no plan meets the budget; the message names the limit that binds and the
nearest feasible point.
"""


class UserError(ValueError):
    """Bad input, said in one or two sentences: what was asked, what was found, what to do."""

    exit_code = 2


class BudgetError(UserError):
    """No plan meets the budget: says which limit binds and the nearest point that is feasible."""

    exit_code = 3
