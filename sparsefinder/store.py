class UserError(ValueError):
    """Wrong input: one clear line saying what came, what was needed and what to do next."""
