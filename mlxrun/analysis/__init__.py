"""Tools on top of the runtime: rooflines, data-set profiles, plots.

Nothing but the command line imports them, and only where an option asks for one.
"""
