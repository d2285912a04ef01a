"""What the programs share: reading configuration, logging, command lines.

No codec and no trust code lives here: agent, cloud and simulator must not
agree with one another merely because they share an implementation.
"""
