class RunError(Exception):
    """What the user can put right: scripts print the message alone and exit with status 2."""
