"""Modules of other packages in a federation: one file a package, run by ``make third-party``."""
