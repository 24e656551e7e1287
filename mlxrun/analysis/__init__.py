"""Tools on top of the runtime: rooflines, data-set profiles, plots, background load.

Nothing but the command line imports them, and only where an option needs one.
"""
